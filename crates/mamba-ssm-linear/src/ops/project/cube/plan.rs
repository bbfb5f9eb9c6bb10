//! Sizes: of tiles, cubes and slices, from the shapes and what the device has.

use burn::tensor::DType;
use cubecl::features::{MmaConfig, Plane};
use cubecl::ir::{ElemType, FloatKind};
use cubecl::prelude::*;

use super::common::SIDE;
use super::matrix::MatrixPlan;
use super::plain::{COLUMNS, DEPTH, PlainPlan, ROWS};
use super::stream::{READ, StreamPlan, WRITE};
use crate::cube::fragment::has_fragments;

/// Units of a cube, where the device has as many.
const UNITS: usize = 256;

/// Planes of a cube on matrix units.
const PLANES: usize = 8;

/// Planes of a cube in the direction of tokens, where there are many tokens.
const MOST_PLANES_M: usize = 8;

/// Registers of a unit that may hold the operands of its tokens.
const MOST_REGISTERS: usize = 64;

/// Operands up to so deep leave room for two blocks of tokens in a plane.
const SHALLOW: usize = 64;

/// Up to so many tokens, smaller cubes: there would be too few large ones.
const FEW_TOKENS: usize = 4096;

/// Bytes of shared memory for the tiles of a cube of `MOST_PLANES_M` planes.
const ENOUGH_MEMORY: usize = 64 * 1024;

/// Most units of a plain cube in one direction: its tiles must fit shared memory everywhere.
const MOST_UNITS: usize = 32;

/// Fewest tokens of a slice.
const SHORTEST_SLICE: usize = 256;

/// Cubes per multiprocessor that a sum over tokens, or a stream of them, is split into.
const CUBES_PER_MULTIPROCESSOR: usize = 2;

/// Multiprocessors of a device that does not say.
const MULTIPROCESSORS: usize = 8;

/// `rows x inner` times `inner x columns`; of a sum over tokens `d_input x tokens x d_output`.
#[derive(Clone, Copy, Debug)]
pub(super) struct Problem {
    pub(super) rows: usize,
    pub(super) inner: usize,
    pub(super) columns: usize,
    pub(super) transposed: bool,
    pub(super) bias: bool,
}

/// Kernel and sizes.
#[derive(Clone, Copy, Debug)]
pub(super) enum Plan {
    Matrix(MatrixPlan),
    Plain(PlainPlan),
}

impl Plan {
    pub(super) fn tile_m(&self) -> usize {
        match self {
            Plan::Matrix(plan) => plan.tile_m(),
            Plan::Plain(plan) => plan.tile_m(),
        }
    }

    pub(super) fn tile_n(&self) -> usize {
        match self {
            Plan::Matrix(plan) => plan.tile_n(),
            Plan::Plain(plan) => plan.tile_n(),
        }
    }

    pub(super) fn depth(&self) -> usize {
        match self {
            Plan::Matrix(plan) => plan.depth,
            Plan::Plain(_) => DEPTH,
        }
    }

    pub(super) fn cube_dim(&self) -> CubeDim {
        CubeDim::new_1d(match self {
            Plan::Matrix(plan) => plan.units() as u32,
            Plan::Plain(plan) => plan.units() as u32,
        })
    }
}

/// Sizes of a device's planes, if it has matrix units for a type.
fn matrix_plane(client: &Client, dtype: DType) -> Option<usize> {
    let kind = match dtype {
        DType::BF16 => FloatKind::BF16,
        DType::F16 => FloatKind::F16,
        _ => return None,
    };
    let properties = client.properties();
    let hardware = &properties.hardware;
    let plane = hardware.plane_size_max as usize;
    let usable = hardware.plane_size_min == hardware.plane_size_max
        && plane <= 64
        && hardware.max_units_per_cube as usize >= PLANES * plane;
    let has_units = properties.features.matmul.cmma.contains(&MmaConfig {
        a_type: ElemType::Float(kind),
        b_type: ElemType::Float(kind),
        cd_type: ElemType::Float(FloatKind::F32),
        m: SIDE as u32,
        n: SIDE as u32,
        k: SIDE as u32,
    });
    (usable && has_units).then_some(plane)
}

fn multiprocessors(client: &Client) -> usize {
    let count = client.properties().hardware.num_streaming_multiprocessors;
    count.map_or(MULTIPROCESSORS, |n| n as usize)
}

/// Planes for `blocks` blocks of which each takes `frags`, at most `most`.
fn planes(blocks: usize, frags: usize, most: usize) -> usize {
    blocks.div_ceil(frags).next_power_of_two().min(most)
}

impl Problem {
    /// Sizes for a product whose rows are tokens, unless [`Problem::stream`] has some.
    pub(super) fn product(&self, client: &Client, dtype: DType, vectors: [usize; 3]) -> Plan {
        let Some(plane) = matrix_plane(client, dtype) else {
            return Plan::Plain(self.plain(client, 16, vectors));
        };
        let blocks_n = self.columns.div_ceil(SIDE);
        let planes_n = blocks_n.min(2);
        // The widest tile among those that leave the fewest columns idle.
        let frags_n = (1..=4)
            .map(|frags| {
                (
                    blocks_n.div_ceil(planes_n * frags) * frags,
                    4 - frags,
                    frags,
                )
            })
            .min()
            .map_or(1, |(_, _, frags)| frags);
        let plan = MatrixPlan {
            planes_m: self.planes_m(client, planes_n * plane),
            planes_n,
            plane,
            frags_m: 1,
            frags_n,
            depth: if self.inner <= SIDE {
                SIDE
            } else if self.inner <= 2 * SIDE {
                2 * SIDE
            } else {
                4 * SIDE
            },
            vectors,
            transposed: self.transposed,
            bias: self.bias,
            sync_plane: client.properties().features.plane.contains(Plane::Sync),
        };
        Plan::Matrix(plan)
    }

    /// Sizes for many tokens and a weight that fits shared memory, so that two cubes share a multiprocessor.
    pub(super) fn stream(
        &self,
        client: &Client,
        dtype: DType,
        [read, vector, write]: [usize; 3],
    ) -> Option<StreamPlan> {
        let plan = StreamPlan {
            planes: PLANES,
            frags: if self.inner <= SHALLOW { 2 } else { 1 },
            inner: self.inner,
            columns: self.columns,
            vector,
            transposed: self.transposed,
            bias: self.bias,
        };
        let hardware = &client.properties().hardware;
        let fits = self.rows > FEW_TOKENS
            && read == READ
            && write.is_multiple_of(WRITE)
            && plan.registers() <= MOST_REGISTERS
            && 2 * plan.bytes() <= hardware.max_shared_memory_size
            && plan.units() <= hardware.max_units_per_cube as usize;
        (fits && has_fragments(client, dtype)).then_some(plan)
    }

    /// Cubes of a stream: as many as run side by side, each with an equal share of the tokens.
    pub(super) fn stream_cubes(&self, client: &Client, plan: &StreamPlan) -> usize {
        let rounds = self.rows.div_ceil(plan.tokens());
        let most = CUBES_PER_MULTIPROCESSOR * multiprocessors(client);
        rounds.div_ceil(rounds.div_ceil(most))
    }

    /// Planes in the direction of tokens: many tokens take cubes of many units with one block of rows each,
    /// which leaves a unit few sums to keep. Planes of two blocks held 170 registers a unit, and a
    /// multiprocessor of 65,536 had room for one cube, which read, multiplied and wrote by turns.
    fn planes_m(&self, client: &Client, others: usize) -> usize {
        let hardware = &client.properties().hardware;
        let fits = hardware.max_units_per_cube as usize >= MOST_PLANES_M * others
            && hardware.max_shared_memory_size >= ENOUGH_MEMORY;
        if self.rows > FEW_TOKENS && fits {
            MOST_PLANES_M
        } else {
            4
        }
    }

    /// Sizes for a sum over tokens; rows are those of the weight.
    pub(super) fn outer(&self, client: &Client, dtype: DType, vectors: [usize; 3]) -> Plan {
        let Some(plane) = matrix_plane(client, dtype) else {
            let units_n = if self.rows <= 64 { 32 } else { 16 };
            return Plan::Plain(self.plain(client, units_n, vectors));
        };
        let (blocks_m, blocks_n) = (self.rows.div_ceil(SIDE), self.columns.div_ceil(SIDE));
        let (frags_m, frags_n) = (blocks_m.min(2), blocks_n.min(2));
        let planes_m = planes(blocks_m, frags_m, 4);
        let plan = MatrixPlan {
            planes_m,
            planes_n: planes(blocks_n, frags_n, PLANES / planes_m),
            plane,
            frags_m,
            frags_n,
            depth: 4 * SIDE,
            vectors,
            transposed: false,
            bias: self.bias,
            sync_plane: client.properties().features.plane.contains(Plane::Sync),
        };
        Plan::Matrix(plan)
    }

    fn plain(&self, client: &Client, most_n: usize, vectors: [usize; 3]) -> PlainPlan {
        let most = (client.properties().hardware.max_units_per_cube as usize).min(UNITS);
        // A power of two, so that the shares of a tile come out even.
        let most = 1 << most.max(1).ilog2();
        let units_n = planes(self.columns, COLUMNS, most_n.min(most));
        let units_m = planes(self.rows, ROWS, MOST_UNITS.min(most / units_n));
        // Tiles of four columns, written four at a time at most.
        let [read, right, write] = vectors;
        PlainPlan {
            units_m,
            units_n,
            vectors: [read, right.min(4), write.min(4)],
            transposed: self.transposed,
            bias: self.bias,
        }
    }

    /// Tokens of a slice and number of slices, for a sum in `tiles` tiles.
    pub(super) fn slices(&self, client: &Client, plan: &Plan, tiles: usize) -> (usize, usize) {
        let wanted = (CUBES_PER_MULTIPROCESSOR * multiprocessors(client) / tiles).max(1);
        let slice = self
            .inner
            .div_ceil(wanted)
            .max(SHORTEST_SLICE)
            .next_multiple_of(plan.depth());
        (slice, self.inner.div_ceil(slice))
    }
}
