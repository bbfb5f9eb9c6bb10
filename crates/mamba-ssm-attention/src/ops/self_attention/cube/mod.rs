//! Attention between the projections on Burn's CubeCL backends: `heads` takes the heads apart and puts them
//! together again, the kernels of `flash_attention` do the rest.

mod heads;

use burn::backend::tensor::FloatTensor;
use burn_cubecl::CubeBackend;
use burn_cubecl::tensor::CubeTensor;

use super::backend::{Forward, Kept, Positions, SelfAttentionBackend};
use super::{Heads, SelfSpec};
use crate::ops::flash_attention::backend::{FlashAttentionBackend, Padding};
use heads::{Turn, merge, split};

/// The turn of queries and keys, or with `inverse` back.
fn turn(positions: Positions<CubeBackend>, spec: &SelfSpec, inverse: bool) -> Option<Turn> {
    match positions {
        Positions::Ignored => None,
        Positions::Turned(cos, sin) => Some(Turn {
            cos,
            sin,
            style: spec.style,
            inverse,
        }),
    }
}

impl SelfAttentionBackend for CubeBackend {
    fn self_attention_forward(
        qkv: FloatTensor<Self>,
        positions: Positions<Self>,
        spec: SelfSpec,
    ) -> Forward<Self> {
        let turn = turn(positions, &spec, false);
        let Heads {
            heads,
            kv_heads,
            head_dim,
        } = spec.heads;
        let [q, k, v] = split(qkv, [heads, kv_heads, kv_heads], head_dim, turn);
        let (out, lse) = Self::flash_attention_forward(
            q.clone(),
            k.clone(),
            v.clone(),
            Padding::None,
            spec.attention,
        );
        Forward {
            y: merge([Some(out.clone()), None, None], None),
            kept: Kept { q, k, v, out, lse },
        }
    }

    fn self_attention_backward(
        kept: Kept<Self>,
        positions: Positions<Self>,
        dy: FloatTensor<Self>,
        spec: SelfSpec,
    ) -> FloatTensor<Self> {
        let Heads {
            heads, head_dim, ..
        } = spec.heads;
        let [dout, _, _]: [CubeTensor; 3] = split(dy, [heads, 0, 0], head_dim, None);
        let (dq, dk, dv) = Self::flash_attention_backward(
            kept.q,
            kept.k,
            kept.v,
            Padding::None,
            kept.out,
            kept.lse,
            dout,
            spec.attention,
        );
        let back = turn(positions, &spec, true);
        merge([Some(dq), Some(dk), Some(dv)], back)
    }
}
