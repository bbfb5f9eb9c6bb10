//! Selective state-space layers (Mamba-1 and Mamba-2) for Burn.
