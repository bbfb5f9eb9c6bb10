//! Sizes, memory, arguments.

use burn::backend::ops::FloatTensorOps;
use burn::tensor::{DType, Shape};
use burn_cubecl::CubeBackend;
use burn_cubecl::tensor::CubeTensor;
use cubecl::prelude::*;

use super::backward::backward as backward_kernel;
use super::forward::{CallLaunch, Plan, forward as forward_kernel};
use crate::ops::cube::common_vector;
use crate::ops::cube::place::Rows;
use crate::ops::cube::reduce::sum_rows;
use crate::ops::cube::{address_type, as_f32, elem, empty_like, grid};

/// Tokens of a run.
const RUN: usize = 32;

/// A convolution: parameters in f32 and where the input lies.
#[derive(Clone)]
pub(crate) struct Conv {
    pub(crate) x: Rows,
    pub(crate) batch: usize,
    pub(crate) length: usize,
    pub(crate) channels: usize,
    /// `[channels, width]`.
    pub(crate) weight: CubeTensor,
    /// `[channels]`.
    pub(crate) bias: Option<CubeTensor>,
    /// `[batch, width - 1, channels]`.
    pub(crate) initial: Option<CubeTensor>,
    pub(crate) activation: bool,
}

/// The gradients of the parameters, f32.
pub(crate) struct ConvGradients {
    /// `[channels, width]`.
    pub(crate) weight: CubeTensor,
    /// `[channels]`.
    pub(crate) bias: CubeTensor,
    /// `[batch, max(width - 1, 1), channels]`; anything where there is no initial state.
    pub(crate) initial: CubeTensor,
}

impl Conv {
    fn width(&self) -> usize {
        self.weight.meta.shape[1]
    }

    fn runs(&self) -> usize {
        self.batch * self.length.div_ceil(RUN)
    }

    fn plan(&self, others: &[&Rows]) -> Plan {
        // Four channels: windows and parameters of more would not fit the registers.
        let most = others
            .iter()
            .fold(self.x.vector(self.channels).min(4), |most, rows| {
                most.min(rows.vector(self.channels))
            });
        Plan {
            width: self.width(),
            vector: common_vector(most, &[self.channels]),
            run: RUN,
            activation: self.activation,
            bias: self.bias.is_some(),
            initial: self.initial.is_some(),
        }
    }

    fn call(&self, plan: &Plan, out: &Rows) -> (CubeCount, CubeDim, CallLaunch) {
        let units = self.runs() * self.channels / plan.vector;
        let most = self
            .x
            .tensor
            .client
            .properties()
            .hardware
            .max_units_per_cube as usize;
        let cube = 128.min(most);
        (
            grid(units.div_ceil(cube)),
            CubeDim::new_1d(cube as u32),
            CallLaunch::new(
                units,
                self.length,
                self.channels,
                self.x.place(),
                out.place(),
            ),
        )
    }

    /// Weight, bias and initial state, f32; the weight in the place of what is absent.
    fn parameters(&self) -> [CubeTensor; 3] {
        let weight = as_f32(self.weight.clone());
        let or_weight =
            |tensor: &Option<CubeTensor>| tensor.clone().map_or_else(|| weight.clone(), as_f32);
        let (bias, initial) = (or_weight(&self.bias), or_weight(&self.initial));
        [weight, bias, initial]
    }

    /// The output, written to `y`'s rows.
    pub(crate) fn forward(&self, y: &Rows) {
        let plan = self.plan(&[y]);
        let (count, dim, call) = self.call(&plan, y);
        let [weight, bias, initial] = self.parameters();
        forward_kernel::launch(
            &self.x.tensor.client,
            count,
            dim,
            address_type(&[&self.x.tensor, &y.tensor]),
            self.x.tensor.clone().into_buffer_arg(),
            weight.into_buffer_arg(),
            bias.into_buffer_arg(),
            initial.into_buffer_arg(),
            y.tensor.clone().into_buffer_arg(),
            call,
            plan,
            elem(self.x.tensor.dtype),
            plan.vector,
        );
    }

    /// The gradient of the input, written to `dx`'s rows, and those of the parameters.
    pub(crate) fn backward(&self, dy: &Rows, dx: &Rows) -> ConvGradients {
        let plan = self.plan(&[dy, dx]);
        let (count, dim, call) = self.call(&plan, dx);
        let [weight, bias, initial] = self.parameters();
        let (width, channels) = (plan.width, self.channels);
        let like = &self.x.tensor;
        let rows = empty_like(like, [self.runs(), (width + 1) * channels], DType::F32);
        let before = (width - 1).max(1);
        let dinitial = empty_like(like, [self.batch, before, channels], DType::F32);
        backward_kernel::launch(
            &like.client,
            count,
            dim,
            address_type(&[like, &dy.tensor, &dx.tensor, &rows]),
            like.clone().into_buffer_arg(),
            weight.into_buffer_arg(),
            bias.into_buffer_arg(),
            initial.into_buffer_arg(),
            dy.tensor.clone().into_buffer_arg(),
            dx.tensor.clone().into_buffer_arg(),
            rows.clone().into_buffer_arg(),
            dinitial.clone().into_buffer_arg(),
            dy.place(),
            call,
            plan,
            elem(like.dtype),
            plan.vector,
        );
        let sums = sum_rows(rows, self.runs(), (width + 1) * channels);
        let part = |from: usize, to: usize| {
            CubeBackend::float_slice(sums.clone(), &[(from * channels..to * channels).into()])
        };
        let shape = Shape::new([channels, width]);
        ConvGradients {
            weight: CubeBackend::float_reshape(part(0, width), shape),
            bias: part(width, width + 1),
            initial: dinitial,
        }
    }
}
