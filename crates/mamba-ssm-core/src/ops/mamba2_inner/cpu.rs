//! The block on Burn's Flex backend: its parts, each reading and writing its columns of the wide rows.

use burn::backend::Flex;
use burn::backend::flex::FlexTensor;

use super::InnerSpec;
use super::backend::{Forward, Gradients, InnerBackend, Operands};
use crate::ops::causal_conv1d::cpu::{Conv, taps};
use crate::ops::gated_rms_norm::backend::Spec as NormSpec;
use crate::ops::gated_rms_norm::cpu::Norm;
use crate::ops::native::rows::{Rows, RowsMut, contiguous, elements, tensor, with_whole_rows};
use crate::ops::native::{working, zeros};
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

    /// Numbers in rows of this width.
    fn numbers(&self, width: usize) -> usize {
        self.batch * self.length * width
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

    fn sizes(&self) -> Sizes {
        Sizes {
            batch: self.batch,
            length: self.length,
            heads: self.spec.heads,
            headdim: self.spec.headdim,
            groups: self.spec.groups,
            state: self.spec.state,
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
            sizes: self.sizes(),
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

impl Block {
    /// The output, `[batch, length, d_inner]`. What the convolution and the scan make and the states before
    /// the chunks (see [`forward`]) go to the other operands.
    fn forward(
        &self,
        convolved: &mut [f32],
        scanned: &mut [f32],
        states: &mut [f32],
    ) -> FlexTensor {
        let (d_inner, channels) = (self.spec.d_inner(), self.spec.conv_dim());
        let rows = RowsMut::new(convolved, self.length, channels);
        self.conv().forward(&rows);
        let rows = RowsMut::new(scanned, self.length, d_inner);
        forward(&self.scan(convolved), &rows, states);
        let mut y = zeros(self.numbers(d_inner));
        let rows = RowsMut::new(&mut y, self.length, d_inner);
        self.norm(scanned).forward(&rows);
        tensor(y, [self.batch, self.length, d_inner])
    }
}

impl InnerBackend for Flex {
    fn mamba2_inner(operands: Operands<Self>, spec: InnerSpec) -> FlexTensor {
        let block = Block::new(operands, spec);
        block.forward(
            &mut working(block.numbers(spec.conv_dim())),
            &mut working(block.numbers(spec.d_inner())),
            &mut working(block.sizes().segment_states()),
        )
    }

    fn mamba2_inner_forward(operands: Operands<Self>, spec: InnerSpec) -> Forward<Self> {
        let block = Block::new(operands, spec);
        let (d_inner, channels) = (spec.d_inner(), spec.conv_dim());
        let mut convolved = zeros(block.numbers(channels));
        let mut scanned = zeros(block.numbers(d_inner));
        let kept = block.sizes().all_states();
        let mut states = zeros(kept);
        let y = block.forward(&mut convolved, &mut scanned, &mut states);
        let shape = |width| [block.batch, block.length, width];
        Forward {
            y,
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

        let mut dzxbcdt = zeros(block.numbers(width));
        let mut dscanned = working(block.numbers(d_inner));
        let mut dxbc = working(block.numbers(channels));
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
