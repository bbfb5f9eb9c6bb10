//! What the kernels of several operators share.

use cubecl::prelude::*;

/// MurmurHash3's 32-bit finaliser: what dropout draws its masks with.
#[cube]
pub(crate) fn mix(x: u32) -> u32 {
    let x = (x ^ (x >> 16)) * 0x85eb_ca6bu32;
    let x = (x ^ (x >> 13)) * 0xc2b2_ae35u32;
    x ^ (x >> 16)
}
