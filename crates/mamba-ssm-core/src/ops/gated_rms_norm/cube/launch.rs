//! Sizes, memory, arguments.

use burn::tensor::DType;
use burn_cubecl::tensor::CubeTensor;
use cubecl::prelude::*;

use super::backward::backward as backward_kernel;
use super::forward::{CallLaunch, Plan, forward as forward_kernel};
use crate::ops::cube::place::Rows;
use crate::ops::cube::reduce::sum_rows;
use crate::ops::cube::{address_type, elem, empty_like, grid};

/// A norm: its weight in f32 and where its operands lie.
#[derive(Clone)]
pub(crate) struct Norm {
    pub(crate) x: Rows,
    pub(crate) z: Option<Rows>,
    /// `[dim]`, f32.
    pub(crate) weight: CubeTensor,
    pub(crate) tokens: usize,
    pub(crate) group: usize,
    pub(crate) eps: f64,
    pub(crate) norm_first: bool,
}

impl Norm {
    fn dim(&self) -> usize {
        self.weight.meta.shape[0]
    }

    fn gate(&self) -> &Rows {
        self.z.as_ref().unwrap_or(&self.x)
    }

    fn plan(&self, run: usize, others: &[&Rows]) -> Plan {
        let hardware = &self.x.tensor.client.properties().hardware;
        let fixed = hardware.plane_size_min == hardware.plane_size_max;
        let lanes = if fixed {
            hardware.plane_size_max as usize
        } else {
            1
        };
        let units = 128.min(hardware.max_units_per_cube as usize);
        let vector = [&self.x, self.gate()]
            .into_iter()
            .chain(others.iter().copied())
            .map(|rows| rows.vector(self.group))
            .min()
            .unwrap_or(1);
        Plan {
            group: self.group,
            vector,
            lanes,
            planes: (units / lanes).max(1),
            run,
            gated: self.z.is_some(),
            norm_first: self.norm_first,
        }
    }

    fn call(&self, plan: &Plan, out: &Rows) -> (CubeCount, CubeDim, CallLaunch) {
        let groups = self.dim() / self.group;
        let planes = self.tokens.div_ceil(plan.run) * groups;
        (
            grid(planes.div_ceil(plan.planes)),
            CubeDim::new_1d((plan.planes * plan.lanes) as u32),
            CallLaunch::new(
                self.tokens,
                groups,
                self.eps as f32,
                self.x.place(),
                self.gate().place(),
                out.place(),
            ),
        )
    }

    /// The output, written to `y`'s rows.
    pub(crate) fn forward(&self, y: &Rows) {
        let plan = self.plan(8, &[y]);
        let (count, dim, call) = self.call(&plan, y);
        forward_kernel::launch(
            &self.x.tensor.client,
            count,
            dim,
            address_type(&[&self.x.tensor, &self.gate().tensor, &y.tensor]),
            self.x.tensor.clone().into_buffer_arg(),
            self.gate().tensor.clone().into_buffer_arg(),
            self.weight.clone().into_buffer_arg(),
            y.tensor.clone().into_buffer_arg(),
            call,
            plan,
            elem(self.x.tensor.dtype),
            plan.vector,
        );
    }

    /// The gradients of x and z, written to their rows, and that of the weight, f32.
    pub(crate) fn backward(&self, dy: &Rows, dx: &Rows, dz: Option<&Rows>) -> CubeTensor {
        let dz = dz.unwrap_or(dx);
        let plan = self.plan(32, &[dy, dx, dz]);
        let (count, dim, call) = self.call(&plan, dx);
        let like = &self.x.tensor;
        let runs = self.tokens.div_ceil(plan.run);
        let rows = empty_like(like, [runs, self.dim()], DType::F32);
        let wide = [
            like,
            &self.gate().tensor,
            &dy.tensor,
            &dx.tensor,
            &dz.tensor,
            &rows,
        ];
        backward_kernel::launch(
            &like.client,
            count,
            dim,
            address_type(&wide),
            like.clone().into_buffer_arg(),
            self.gate().tensor.clone().into_buffer_arg(),
            self.weight.clone().into_buffer_arg(),
            dy.tensor.clone().into_buffer_arg(),
            dx.tensor.clone().into_buffer_arg(),
            dz.tensor.clone().into_buffer_arg(),
            rows.clone().into_buffer_arg(),
            dy.place(),
            dz.place(),
            call,
            plan,
            elem(like.dtype),
            plan.vector,
        );
        sum_rows(rows, runs, self.dim())
    }
}
