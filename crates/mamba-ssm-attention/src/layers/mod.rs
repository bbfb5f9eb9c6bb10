//! The layers: causal self-attention, the feed-forward part and the Transformer made of them.

mod attention;
mod mlp;
mod norm;
mod transformer;

pub use attention::{Attention, AttentionConfig, AttentionState};
pub use mlp::{Mlp, MlpConfig};
pub use transformer::{Transformer, TransformerBlock, TransformerConfig, TransformerState};
