//! The walks over the chunks: what segments start from, states between chunks, and, with fragments, the outputs.

use burn::tensor::DType;
use burn_cubecl::tensor::CubeTensor;
use cubecl::prelude::*;

use super::forward_matrix::forward_matrix;
use super::plan::Sizes;
use super::ready::{Destinations, Ready, Scan};
use super::scores_matrix::{scores_matrix, scores_size};
use super::states::{Direction, pass, walk};
use super::states_matrix::walk_matrix;
use crate::ops::cube::place::Rows;
use crate::ops::cube::{empty_like, grid};

impl Ready {
    /// One walk over the chunks of every segment, from `rows` and `onto`: x and B forwards, dy and C
    /// backwards. Writes what the mode names.
    fn walk(
        &self,
        [rows, onto]: [&Rows; 2],
        [step, sum]: [&CubeTensor; 2],
        start: CubeTensor,
        [states, last, totals]: [CubeTensor; 3],
        mode: Direction,
    ) {
        let cubes = self.walkers(&self.state_plan) * self.segments(mode.backwards).0;
        let (client, count) = (self.client(), grid(cubes));
        let read = [&rows.tensor, &onto.tensor, step, sum, &start];
        let [x, b, step, sum, start] = read.map(|tensor| tensor.clone().into_buffer_arg());
        let [states, last, totals] = [states, last, totals].map(CubeTensor::into_buffer_arg);
        let call = self.call(cubes, [rows, onto], &self.own(), mode.backwards);
        let (plan, addresses, vectors) = (self.state_plan, self.addresses, self.vectors());
        macro_rules! launch {
            ($kernel:ident, $dim:expr, $types:expr) => {
                $kernel::launch(
                    &client, count, $dim, addresses, x, b, step, sum, start, states, last, totals,
                    call, plan, mode, $types, vectors,
                )
            };
        }
        if plan.fragments {
            let [input, _, kept] = self.types;
            let dim = CubeDim::new_1d(plan.walk_units() as u32);
            launch!(walk_matrix, dim, [input, kept]);
        } else {
            launch!(walk, plan.team.cube_dim(), self.types);
        }
    }

    /// A tensor in place of one that is not wanted.
    fn nothing(&self) -> CubeTensor {
        empty_like(&self.scan.x.tensor, [16], DType::F32)
    }

    /// What every segment's walk starts from: with more than one, a walk of its own finds what each adds.
    fn starts(
        &self,
        rows: [&Rows; 2],
        steps: [&CubeTensor; 2],
        start: Option<CubeTensor>,
        backwards: bool,
    ) -> Option<CubeTensor> {
        let (segments, _) = self.segments(backwards);
        if segments == 1 {
            return start;
        }
        let (like, size) = (&self.scan.x.tensor, self.state_size());
        let Sizes { batch, heads, .. } = self.sizes;
        let ends = empty_like(like, [batch, segments, size], DType::F32);
        let totals = empty_like(like, [batch, segments, heads], DType::F32);
        let states = empty_like(like, [16], self.states);
        let alone = Direction {
            backwards,
            start: false,
            emit: false,
            ends: true,
        };
        let to = [states, ends.clone(), totals.clone()];
        self.walk(rows, steps, self.nothing(), to, alone);
        let mode = Direction {
            start: start.is_some(),
            ..alone
        };
        let vectors = batch * size / self.plan.vector_n;
        let (count, dim) = self.elementwise(vectors);
        pass::launch(
            &self.client(),
            count,
            dim,
            self.addresses,
            totals.into_buffer_arg(),
            start.unwrap_or_else(|| self.nothing()).into_buffer_arg(),
            ends.clone().into_buffer_arg(),
            size,
            self.own_call(vectors, backwards),
            self.plan,
            mode,
            self.plan.vector_n,
        );
        Some(ends)
    }

    /// Room for the states at the boundaries of chunks, or nothing, and for that behind the last.
    fn room(&self, keep: bool) -> [CubeTensor; 2] {
        let Sizes {
            batch,
            heads,
            headdim,
            state,
            ..
        } = self.sizes;
        let like = &self.scan.x.tensor;
        let parts = self.plan.parts;
        let kept = if keep {
            batch * self.chunks() * self.state_size()
        } else {
            16
        };
        [
            empty_like(like, [kept], self.states),
            empty_like(
                like,
                [batch, heads / parts, headdim * parts, state],
                DType::F32,
            ),
        ]
    }

    /// The states at the boundaries of chunks and behind the last.
    pub(super) fn states(
        &self,
        rows: [&Rows; 2],
        steps: [&CubeTensor; 2],
        start: Option<CubeTensor>,
        backwards: bool,
    ) -> [CubeTensor; 2] {
        let start = self.starts(rows, steps, start, backwards);
        let [states, last] = self.room(true);
        let mode = Direction {
            backwards,
            start: start.is_some(),
            emit: true,
            ends: false,
        };
        let start = start.unwrap_or_else(|| self.nothing());
        let to = [states.clone(), last.clone(), self.nothing()];
        self.walk(rows, steps, start, to, mode);
        [states, last]
    }

    /// `C B^T` of every chunk, or nothing where every cube finds its own.
    fn scores(&self) -> CubeTensor {
        if !self.plan.scores_given {
            return self.nothing();
        }
        let Scan { x, b, c, .. } = &self.scan;
        let cubes = self.sizes.batch * self.chunks() * self.sizes.groups;
        let scores = empty_like(&x.tensor, [cubes * scores_size(self.plan)], DType::F32);
        scores_matrix::launch(
            &self.client(),
            grid(cubes),
            CubeDim::new_1d(self.plan.score_units() as u32),
            self.addresses,
            b.tensor.clone().into_buffer_arg(),
            c.tensor.clone().into_buffer_arg(),
            scores.clone().into_buffer_arg(),
            self.own_call(cubes, false),
            self.plan,
            self.types[0],
            self.plan.vector_n,
        );
        scores
    }

    /// Outputs and states in one walk, with fragments.
    pub(super) fn forward_matrix(
        &self,
        steps: [&CubeTensor; 2],
        y: &Rows,
        keep: bool,
    ) -> [CubeTensor; 2] {
        let Scan { x, b, c, .. } = &self.scan;
        let start = self.starts([x, b], steps, self.scan.initial.clone(), false);
        let [states, last] = self.room(keep);
        let mode = Direction {
            backwards: false,
            start: start.is_some(),
            emit: keep,
            ends: false,
        };
        let cubes = self.walkers(&self.plan) * self.segments(false).0;
        let to = Destinations {
            x: y.clone(),
            ..self.own()
        };
        let [input, _, kept] = self.types;
        forward_matrix::launch(
            &self.client(),
            grid(cubes),
            CubeDim::new_1d(self.plan.forward_units() as u32),
            self.addresses,
            x.tensor.clone().into_buffer_arg(),
            b.tensor.clone().into_buffer_arg(),
            c.tensor.clone().into_buffer_arg(),
            self.scores().into_buffer_arg(),
            self.d.clone().into_buffer_arg(),
            steps[0].clone().into_buffer_arg(),
            steps[1].clone().into_buffer_arg(),
            start.unwrap_or_else(|| self.nothing()).into_buffer_arg(),
            y.tensor.clone().into_buffer_arg(),
            states.clone().into_buffer_arg(),
            last.clone().into_buffer_arg(),
            self.call(cubes, [x, b], &to, false),
            self.plan,
            mode,
            [input, kept],
            self.vectors(),
        );
        [states, last]
    }
}
