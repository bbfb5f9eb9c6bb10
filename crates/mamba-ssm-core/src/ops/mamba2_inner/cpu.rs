//! The block on Burn's Flex backend: its parts, each reading and writing its columns of the wide rows.

use burn::backend::Flex;
use burn::backend::flex::FlexTensor;

use super::InnerSpec;
use super::backend::{Forward, Gradients, InnerBackend, Operands};
use crate::ops::causal_conv1d::cpu::{Conv, taps};
use crate::ops::gated_rms_norm::backend::Spec as NormSpec;
use crate::ops::gated_rms_norm::cpu::Norm;
use crate::ops::native::rows::{Rows, RowsMut, contiguous, elements, tensor, with_whole_rows};
use crate::ops::native::zeros;
use crate::ops::ssd::backend::Spec as ScanSpec;
use crate::ops::ssd::cpu::{Destinations, Scan, Sizes, backward, forward};

/// Operands whose storage can be read in place.
struct Block {
    zxbcdt: FlexTensor,
    taps: Vec<f32>,
    conv_bias: Option<FlexTensor>,
    dt_bias: FlexTensor,
    a: FlexTensor,
    d: FlexTensor,
    norm_weight: FlexTensor,
    batch: usize,
    length: usize,
    spec: InnerSpec,
}

impl Block {
    fn new(operands: Operands<Flex>, spec: InnerSpec) -> Self {
        let [batch, length, _] = operands.zxbcdt.layout().shape().dims();
        let weight = contiguous(operands.conv_weight);
        Self {
            zxbcdt: with_whole_rows(operands.zxbcdt),
            taps: taps(elements(&weight), spec.conv_dim()),
            conv_bias: operands.conv_bias.into_option().map(contiguous),
            dt_bias: contiguous(operands.dt_bias),
            a: contiguous(operands.a),
            d: contiguous(operands.d),
            norm_weight: contiguous(operands.norm_weight),
            batch,
            length,
            spec,
        }
    }

    /// Columns of x, B and C in the projection's output.
    fn xbc(&self) -> usize {
        self.spec.d_inner()
    }

    /// Columns of dt in the projection's output.
    fn dt(&self) -> usize {
        self.spec.d_inner() + self.spec.conv_dim()
    }

    /// Columns of B and C in the convolution's output.
    fn bc(&self) -> [usize; 2] {
        let b = self.spec.d_inner();
        [b, b + self.spec.groups * self.spec.state]
    }

    fn rows(&self, width: usize) -> Vec<f32> {
        zeros(self.batch * self.length * width)
    }

    fn conv(&self) -> Conv<'_> {
        let channels = self.spec.conv_dim();
        Conv {
            x: Rows::new(&self.zxbcdt).columns(self.xbc(), channels),
            batch: self.batch,
            length: self.length,
            channels,
            taps: &self.taps,
            bias: self.conv_bias.as_ref().map(elements),
            initial: None,
            activation: true,
        }
    }

    fn scan<'a>(&'a self, convolved: &'a [f32]) -> Scan<'a> {
        let spec = &self.spec;
        let [b, c] = self.bc();
        let rows = Rows::dense(convolved, self.length, spec.conv_dim());
        let narrow = spec.groups * spec.state;
        Scan {
            x: rows.columns(0, spec.d_inner()),
            b: rows.columns(b, narrow),
            c: rows.columns(c, narrow),
            dt: Rows::new(&self.zxbcdt).columns(self.dt(), spec.heads),
            a: elements(&self.a),
            d: Some(elements(&self.d)),
            bias: Some(elements(&self.dt_bias)),
            initial: None,
            sizes: Sizes {
                batch: self.batch,
                length: self.length,
                heads: spec.heads,
                headdim: spec.headdim,
                groups: spec.groups,
                state: spec.state,
            },
            spec: ScanSpec {
                softplus: true,
                limit: spec.dt_limit,
            },
        }
    }

    fn norm<'a>(&'a self, scanned: &'a [f32]) -> Norm<'a> {
        let d_inner = self.spec.d_inner();
        Norm {
            x: Rows::dense(scanned, self.length, d_inner),
            z: Some(Rows::new(&self.zxbcdt).columns(0, d_inner)),
            weight: elements(&self.norm_weight),
            batch: self.batch,
            length: self.length,
            spec: NormSpec {
                group: d_inner / self.spec.groups,
                eps: self.spec.eps,
                norm_before_gate: self.spec.norm_before_gate,
            },
        }
    }
}

impl InnerBackend for Flex {
    fn mamba2_inner_forward(operands: Operands<Self>, spec: InnerSpec) -> Forward<Self> {
        let block = Block::new(operands, spec);
        let (d_inner, channels) = (spec.d_inner(), spec.conv_dim());
        let mut convolved = block.rows(channels);
        block
            .conv()
            .forward(&RowsMut::new(&mut convolved, block.length, channels));
        let mut scanned = block.rows(d_inner);
        let rows = RowsMut::new(&mut scanned, block.length, d_inner);
        let (_, states) = forward(&block.scan(&convolved), &rows, true);
        let mut y = block.rows(d_inner);
        block
            .norm(&scanned)
            .forward(&RowsMut::new(&mut y, block.length, d_inner));
        let kept = states.len();
        let shape = |width| [block.batch, block.length, width];
        Forward {
            y: tensor(y, shape(d_inner)),
            convolved: tensor(convolved, shape(channels)),
            scanned: tensor(scanned, shape(d_inner)),
            states: tensor(states, [kept]),
        }
    }

    fn mamba2_inner_backward(
        operands: Operands<Self>,
        convolved: FlexTensor,
        scanned: FlexTensor,
        states: FlexTensor,
        dy: FlexTensor,
        spec: InnerSpec,
    ) -> Gradients<Self> {
        let block = Block::new(operands, spec);
        let (d_inner, channels, length) = (spec.d_inner(), spec.conv_dim(), block.length);
        let width = d_inner + channels + spec.heads;
        let [convolved, scanned] = [&convolved, &scanned].map(elements);
        let dy = with_whole_rows(dy);

        let mut dzxbcdt = block.rows(width);
        let mut dscanned = block.rows(d_inner);
        let mut dxbc = block.rows(channels);
        let wide = RowsMut::new(&mut dzxbcdt, length, width);
        let to_scanned = RowsMut::new(&mut dscanned, length, d_inner);
        let dnorm = block
            .norm(scanned)
            .backward(Rows::new(&dy), &to_scanned, Some(&wide));
        let to_xbc = RowsMut::new(&mut dxbc, length, channels);
        let [b, c] = block.bc();
        let to = Destinations {
            x: to_xbc.columns(0),
            b: to_xbc.columns(b),
            c: to_xbc.columns(c),
            dt: wide.columns(block.dt()),
        };
        let dscanned = Rows::dense(&dscanned, length, d_inner);
        let found = backward(
            &block.scan(convolved),
            elements(&states),
            dscanned,
            None,
            &to,
        );
        let dxbc = Rows::dense(&dxbc, length, channels);
        let dconv = block
            .conv()
            .backward(dxbc, &wide.columns(block.xbc()), None);
        Gradients {
            conv_weight: tensor(dconv.weight, [channels, block.taps.len() / channels]),
            conv_bias: tensor(dconv.bias, [channels]),
            dt_bias: tensor(found.bias, [spec.heads]),
            a: tensor(found.a, [spec.heads]),
            d: tensor(found.d, [spec.heads, spec.headdim]),
            norm_weight: tensor(dnorm, [d_inner]),
            zxbcdt: tensor(dzxbcdt, [block.batch, length, width]),
        }
    }
}
