//! Token projections for Burn with fast weight gradients: many tokens, few features in and out.
