//! Causal attention with rotary positions and a Transformer forecaster for Burn.
