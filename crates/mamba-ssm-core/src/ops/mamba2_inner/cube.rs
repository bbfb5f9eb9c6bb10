//! The inner block on Burn's CubeCL backends: the kernels of the convolution, the scan and the norm, one
//! after the other, each reading and writing its columns of the wide tensors in place. Nothing is sliced
//! or concatenated in memory, forwards or backwards.

use burn::backend::ops::FloatTensorOps;
use burn::backend::tensor::FloatTensor;
use burn::tensor::Shape;
use burn_cubecl::CubeBackend;

use super::InnerSpec;
use super::backend::{Forward, Gradients, InnerBackend, Operands};
use crate::ops::causal_conv1d::cube::Conv;
use crate::ops::cube::place::Rows;
use crate::ops::cube::{as_f32, empty_like};
use crate::ops::gated_rms_norm::cube::Norm;
use crate::ops::ssd::backend::Spec;
use crate::ops::ssd::cube::{Destinations, Scan, Sizes, backward, forward};

/// The block's columns: where they start in the projection's output and in the convolution's.
struct Columns {
    batch: usize,
    length: usize,
    /// Of x, B and C in the projection's output.
    xbc: usize,
    dt: usize,
    /// In the convolution's output.
    b: usize,
    c: usize,
}

impl Columns {
    fn new(operands: &Operands<CubeBackend>, spec: &InnerSpec) -> Self {
        let [batch, length, _] = operands.zxbcdt.meta.shape.dims();
        Self {
            batch,
            length,
            xbc: spec.d_inner(),
            dt: spec.d_inner() + spec.conv_dim(),
            b: spec.d_inner(),
            c: spec.d_inner() + spec.groups * spec.state,
        }
    }
}

fn conv(zxbcdt: &Rows, operands: &Operands<CubeBackend>, at: &Columns, spec: &InnerSpec) -> Conv {
    Conv {
        x: zxbcdt.from(at.xbc),
        batch: at.batch,
        length: at.length,
        channels: spec.conv_dim(),
        weight: operands.conv_weight.clone(),
        bias: operands.conv_bias.clone().into_option(),
        initial: None,
        activation: true,
    }
}

fn scan(
    zxbcdt: &Rows,
    xbc: &Rows,
    operands: &Operands<CubeBackend>,
    at: &Columns,
    spec: &InnerSpec,
) -> Scan {
    Scan {
        x: xbc.clone(),
        b: xbc.from(at.b),
        c: xbc.from(at.c),
        dt: zxbcdt.from(at.dt),
        a: as_f32(operands.a.clone()),
        d: Some(as_f32(operands.d.clone())),
        bias: Some(as_f32(operands.dt_bias.clone())),
        initial: None,
        sizes: Sizes {
            batch: at.batch,
            length: at.length,
            heads: spec.heads,
            headdim: spec.headdim,
            groups: spec.groups,
            state: spec.state,
        },
        spec: Spec {
            softplus: true,
            limit: spec.dt_limit,
        },
    }
}

fn norm(
    zxbcdt: &Rows,
    scanned: &Rows,
    operands: &Operands<CubeBackend>,
    at: &Columns,
    spec: &InnerSpec,
) -> Norm {
    Norm {
        x: scanned.clone(),
        z: Some(zxbcdt.clone()),
        weight: as_f32(operands.norm_weight.clone()),
        tokens: at.batch * at.length,
        group: spec.d_inner() / spec.groups,
        eps: spec.eps,
        norm_first: spec.norm_before_gate,
    }
}

/// New rows of `width` columns.
fn rows(like: &Rows, at: &Columns, width: usize) -> Rows {
    Rows::whole(empty_like(
        &like.tensor,
        [at.batch, at.length, width],
        like.tensor.dtype,
    ))
}

impl InnerBackend for CubeBackend {
    fn mamba2_inner_forward(operands: Operands<Self>, spec: InnerSpec) -> Forward<Self> {
        let at = Columns::new(&operands, &spec);
        let zxbcdt = Rows::whole(operands.zxbcdt.clone());
        let xbc = rows(&zxbcdt, &at, spec.conv_dim());
        conv(&zxbcdt, &operands, &at, &spec).forward(&xbc);
        let scanned = rows(&zxbcdt, &at, spec.d_inner());
        let scan = scan(&zxbcdt, &xbc, &operands, &at, &spec);
        let (_, states) = forward(scan, &scanned, true);
        let y = rows(&zxbcdt, &at, spec.d_inner());
        norm(&zxbcdt, &scanned, &operands, &at, &spec).forward(&y);
        Forward {
            y: y.tensor,
            convolved: xbc.tensor,
            scanned: scanned.tensor,
            states,
        }
    }

    fn mamba2_inner_backward(
        operands: Operands<Self>,
        convolved: FloatTensor<Self>,
        scanned: FloatTensor<Self>,
        states: FloatTensor<Self>,
        dy: FloatTensor<Self>,
        spec: InnerSpec,
    ) -> Gradients<Self> {
        let at = Columns::new(&operands, &spec);
        let [zxbcdt, xbc, scanned, dy] =
            [operands.zxbcdt.clone(), convolved, scanned, dy].map(Rows::whole);
        let dzxbcdt = rows(&zxbcdt, &at, zxbcdt.row);
        let dscanned = rows(&zxbcdt, &at, spec.d_inner());
        let dnorm =
            norm(&zxbcdt, &scanned, &operands, &at, &spec).backward(&dy, &dscanned, Some(&dzxbcdt));
        let dxbc = rows(&zxbcdt, &at, spec.conv_dim());
        let to = Destinations {
            x: dxbc.clone(),
            b: dxbc.from(at.b),
            c: dxbc.from(at.c),
            dt: dzxbcdt.from(at.dt),
        };
        let scan = scan(&zxbcdt, &xbc, &operands, &at, &spec);
        let found = backward(scan, states, &dscanned, None, &to);
        let conv = conv(&zxbcdt, &operands, &at, &spec);
        let dconv = conv.backward(&dxbc, &dzxbcdt.from(at.xbc));
        Gradients {
            zxbcdt: dzxbcdt.tensor,
            conv_weight: dconv.weight,
            conv_bias: dconv.bias,
            dt_bias: found.bias,
            a: found.a,
            d: CubeBackend::float_reshape(found.d, Shape::new([spec.heads, spec.headdim])),
            norm_weight: dnorm,
        }
    }
}
