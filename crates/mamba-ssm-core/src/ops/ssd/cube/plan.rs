//! Sizes: what a kernel is compiled for and what a call brings.

use burn::tensor::DType;
use cubecl::ir::HardwareProperties;
use cubecl::prelude::*;

use crate::ops::cube::fragment::{LANES, has_fragments};
use crate::ops::cube::place::Place;
use crate::ops::cube::product::{Lie, Part, Product};
use crate::ops::cube::tile::Tile;
use crate::ops::cube::{SIDE, Team};
use crate::ops::ssd::cube::gradients::{KEPT, kept_parts, pair_parts, parts};
use crate::ops::ssd::cube::gradients_matrix;
use crate::ops::ssd::cube::launch::states_dtype;

/// What a kernel is compiled for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) struct Plan {
    /// Tokens of a chunk.
    pub(super) chunk: usize,
    /// Size of the state.
    pub(super) state: usize,
    pub(super) headdim: usize,
    /// Parts of a head: where a head as it is needs more shared memory than there is, each part of its channels is
    /// treated as a head, with the same steps and the same rate. `heads` and `headdim` are of parts everywhere but in
    /// `dt`, its bias and `A`.
    pub(super) parts: usize,
    /// Heads that a cube treats at once: a tile of channels.
    pub(super) heads: usize,
    /// Elements of x, and of B, C and the states, read at once.
    pub(super) vector_x: usize,
    pub(super) vector_n: usize,
    pub(super) softplus: bool,
    pub(super) skip: bool,
    pub(super) team: Team,
    /// Whether the passes multiply fragments in registers.
    pub(super) fragments: bool,
    /// Whether `C B^T` is found before the forward pass with fragments, for all heads of a group.
    pub(super) scores_given: bool,
    /// Whether the forward pass with fragments has room in shared memory for the next chunk beside the one at
    /// work.
    pub(super) two_chunks: bool,
    /// And the pass for gradients, for the next tile.
    pub(super) two_tiles: bool,
    /// Parts of the state that planes of the same channels have in walks with fragments.
    pub(super) state_parts: usize,
    /// Blocks of 16 channels that a plane of a walk for states has; one where the walk finds outputs too.
    pub(super) row_blocks: usize,
    /// Whether the states between chunks are kept in the type of the tiles.
    pub(super) kept_as_tile: bool,
}

/// Gaps behind the rows of tiles, so that the rows of a block fall into different banks.
const GAP: usize = 8;

/// Units of a cube that has a multiprocessor to itself.
const WIDE: usize = 512;

/// The largest state that a plane keeps in registers for 16 channels: 64 of a unit's.
const MOST_STATE: usize = 128;

/// Most channels of a cube of a walk for states with fragments.
const MOST_CHANNELS: usize = 128;

/// Units that a multiprocessor runs of a forward pass with fragments.
pub(super) const OUTPUT_UNITS: usize = 256;

/// Registers of a unit that may be taken while products are found. Measured: two chunks at once are no faster where
/// 80 are, and 13 % faster where 144 are.
const ENOUGH_REGISTERS: usize = 96;

/// Bytes that a device keeps of the shared memory of every cube.
pub(super) const CUBE_BYTES: usize = 1024;

/// Bytes that aligning every array of shared memory may cost.
pub(super) const ALIGNMENT: usize = 16 * 20;

impl Plan {
    /// The plan of the pass for gradients: where shared memory leaves room for one cube of it only, that
    /// cube has twice the units.
    pub(super) fn for_gradients(self, client: &Client, tile: DType) -> Self {
        let wide = Self {
            team: Team::new(client, WIDE, tile),
            ..self
        };
        let memory = client.properties().hardware.max_shared_memory_size;
        let one = 2 * self.gradient_bytes(tile.size()) > memory;
        if one && wide.team.matrix && wide.gradient_bytes(tile.size()) <= memory {
            wide
        } else {
            self
        }
    }

    /// The plan of a walk for states alone, with fragments: as many heads as a cube has planes for, which then
    /// share what is read of B, and two planes to the state of a head's channels, each of two blocks of them where a
    /// head has so many: what a plane reads of x and of B is then multiplied twice and four times. (A walk that finds
    /// outputs too is better off in small cubes, which do not wait for each other: `docs/performance.md`.)
    pub(super) fn for_states(self, sizes: &Sizes, hardware: &HardwareProperties) -> Self {
        let halves = self.state_padded().is_multiple_of(2 * SIDE);
        let pairs = halves && self.headdim_padded().is_multiple_of(2 * SIDE);
        let plan = Self {
            state_parts: if halves { 2 } else { 1 },
            row_blocks: if pairs { 2 } else { 1 },
            ..self
        };
        let wider = (1..=sizes.heads_per_group())
            .rev()
            .filter(|heads| sizes.heads_per_group().is_multiple_of(*heads))
            .map(|heads| Self { heads, ..plan })
            .find(|plan| {
                plan.channels() <= MOST_CHANNELS
                    && plan.walk_units() <= hardware.max_units_per_cube as usize
                    && plan.walk_bytes() <= hardware.max_shared_memory_size
            });
        match wider {
            Some(wider) if wider.heads >= self.heads => wider,
            _ => self,
        }
    }

    /// Columns of the state that a plane of a walk has.
    pub(super) fn state_columns(&self) -> usize {
        self.state_padded() / self.state_parts
    }

    /// Planes of a walk: one for a block or two of 16 channels and a part of the state.
    fn walk_planes(&self) -> usize {
        self.channels() / SIDE / self.row_blocks * self.state_parts
    }

    pub(super) fn walk_units(&self) -> usize {
        self.walk_planes() * LANES
    }

    /// In how many parts planes share the heads, and the channels of a head, of 16 tokens: as many as keep the
    /// planes of the walk busy.
    pub(super) fn output_parts(&self) -> (usize, usize) {
        let most = (self.walk_planes() / (self.chunk / SIDE)).max(1);
        let parts = |count: usize| (1..=count.min(most)).filter(move |n| count.is_multiple_of(*n));
        parts(self.heads)
            .flat_map(|heads| {
                parts(self.headdim_padded() / SIDE).map(move |channels| (heads, channels))
            })
            .filter(|(heads, channels)| heads * channels <= most)
            .max_by_key(|(heads, channels)| (heads * channels, *heads))
            .unwrap_or((1, 1))
    }

    /// Planes at work on a chunk's outputs.
    pub(super) fn output_planes(&self) -> usize {
        let (heads, channels) = self.output_parts();
        self.chunk / SIDE * heads * channels
    }

    /// Units of a cube of the forward pass with fragments.
    pub(super) fn forward_units(&self) -> usize {
        self.walk_planes().max(self.output_planes()) * LANES
    }

    /// Tokens' steps of a chunk, of every head of a tile, that each of so many units carries.
    pub(super) fn step_shares(&self, units: usize) -> usize {
        (self.chunk * self.heads).div_ceil(units)
    }

    /// Units of a cube that finds `C B^T`.
    pub(super) fn score_units(&self) -> usize {
        self.chunk / SIDE * LANES
    }

    /// Bytes of shared memory of a walk for states with fragments, of 16-bit tiles.
    fn walk_bytes(&self) -> usize {
        2 * (self.tile_x().size() + self.tile_n().size())
            + 4 * (self.chunk + 3) * self.heads
            + CUBE_BYTES
            + ALIGNMENT
    }

    /// Whether a unit of the forward pass with fragments would have more numbers waiting in registers for the next
    /// chunk, beside its state, than leaves the products enough.
    fn is_short_of_registers(&self) -> bool {
        let waiting = self.chunk * (self.channels() + 2 * self.state_padded()) / 2;
        let state = self.state_columns() * self.row_blocks * SIDE / LANES;
        waiting / self.forward_units() + state > ENOUGH_REGISTERS
    }

    /// Bytes of shared memory of the forward pass with fragments, of 16-bit tiles, with so many chunks at once.
    fn forward_bytes(&self, chunks: usize) -> usize {
        let tiles = chunks * (self.tile_x().size() + 2 * self.tile_n().size());
        let state = self.channels() * self.stride_n();
        let decays = chunks * self.heads * (4 * self.chunk + 1);
        2 * (tiles + state) + 4 * (decays + self.channels()) + CUBE_BYTES + ALIGNMENT
    }

    /// Units of a cube of the gradients with fragments: a plane for 16 later tokens and one for 16 earlier.
    pub(super) fn gradient_units(&self) -> usize {
        2 * self.chunk / SIDE * LANES
    }

    pub(super) fn state_padded(&self) -> usize {
        self.state.next_multiple_of(SIDE)
    }

    pub(super) fn headdim_padded(&self) -> usize {
        self.headdim.next_multiple_of(SIDE)
    }

    /// Channels of a tile, with the padding of each head.
    pub(super) fn channels(&self) -> usize {
        self.heads * self.headdim_padded()
    }

    pub(super) fn stride_n(&self) -> usize {
        self.state_padded() + GAP
    }

    pub(super) fn stride_x(&self) -> usize {
        self.channels() + GAP
    }

    pub(super) fn stride_q(&self) -> usize {
        self.chunk + GAP
    }

    /// Between the rows of the f32 stage, whatever it holds.
    pub(super) fn stride_stage(&self) -> usize {
        self.channels().max(self.chunk).max(self.state_padded()) + GAP
    }

    /// Tokens by channels.
    pub(super) fn tile_x(&self) -> Tile {
        Tile {
            rows: self.chunk,
            groups: self.heads,
            width: self.headdim,
            padded: self.headdim_padded(),
            stride: self.stride_x(),
            vector: self.vector_x,
        }
    }

    /// Tokens by state: B or C.
    pub(super) fn tile_n(&self) -> Tile {
        Tile {
            rows: self.chunk,
            groups: 1,
            width: self.state,
            padded: self.state_padded(),
            stride: self.stride_n(),
            vector: self.vector_n,
        }
    }

    fn product(&self, m: usize, n: usize, k: usize, a: Lie, b: Lie) -> Product {
        Product {
            batch: 1,
            m,
            n,
            k,
            a,
            b,
            out: Lie::rows(self.stride_stage()),
            part: Part::All,
            add: false,
        }
    }

    /// `C B^T`, tokens by tokens.
    pub(super) fn scores(&self) -> Product {
        let n = Lie::rows(self.stride_n());
        let b = Lie::transposed(self.stride_n());
        self.product(self.chunk, self.chunk, self.state_padded(), n, b)
    }

    /// `X^T B`, channels by state.
    pub(super) fn outer(&self) -> Product {
        let x = Lie::transposed(self.stride_x());
        let n = Lie::rows(self.stride_n());
        self.product(self.channels(), self.state_padded(), self.chunk, x, n)
    }

    /// `C H^T`, tokens by channels.
    pub(super) fn carried(&self) -> Product {
        let n = Lie::rows(self.stride_n());
        let h = Lie::transposed(self.stride_n());
        self.product(self.chunk, self.channels(), self.state_padded(), n, h)
    }

    /// `stage += M X` for every head of the tile (`M` lower triangular), or `M^T X`.
    pub(super) fn mixed(&self, transposed: bool) -> Product {
        let m = Lie {
            transposed,
            ..Lie::rows(self.stride_q())
        };
        let padded = self.headdim_padded();
        Product {
            batch: self.heads,
            out: Lie::rows(self.stride_stage()).batched(padded),
            part: if transposed { Part::Upper } else { Part::Lower },
            add: true,
            ..self.product(
                self.chunk,
                padded,
                self.chunk,
                m.batched(self.chunk * self.stride_q()),
                Lie::rows(self.stride_x()).batched(padded),
            )
        }
    }

    /// `X Y^T` of one head, tokens by tokens.
    pub(super) fn pairs(&self) -> Product {
        let x = Lie::rows(self.stride_x()).batched(self.headdim_padded());
        let y = Lie::transposed(self.stride_x()).batched(self.headdim_padded());
        self.product(self.chunk, self.chunk, self.headdim_padded(), x, y)
    }

    /// `X H`, tokens by state, over all channels of the tile.
    pub(super) fn onto_state(&self) -> Product {
        let x = Lie::rows(self.stride_x());
        let h = Lie::rows(self.stride_n());
        self.product(self.chunk, self.state_padded(), self.channels(), x, h)
    }

    /// `M B` or `M^T C`, tokens by state.
    pub(super) fn through_scores(&self, transposed: bool) -> Product {
        let m = Lie {
            transposed,
            ..Lie::rows(self.stride_q())
        };
        let n = Lie::rows(self.stride_n());
        Product {
            part: if transposed { Part::Upper } else { Part::Lower },
            ..self.product(self.chunk, self.state_padded(), self.chunk, m, n)
        }
    }

    /// Whether the state of a plane's channels fits its registers, and pairs can be written.
    fn suits_fragments(&self, hardware: &HardwareProperties) -> bool {
        self.state_padded() <= MOST_STATE
            && self.vector_x.min(self.vector_n) >= 2
            && self.forward_units().max(self.gradient_units())
                <= hardware.max_units_per_cube as usize
    }

    /// Bytes of shared memory of the pass for gradients, the hungriest.
    fn gradient_bytes(&self, tile: usize) -> usize {
        let tiles = 2 * self.tile_n().size()
            + 2 * self.tile_x().size()
            + 2 * self.channels() * self.stride_n()
            + self.heads * self.chunk * self.stride_q();
        let stage = self.chunk.max(self.channels()) * self.stride_stage();
        let terms = self.chunk * self.heads * (3 + 2 * parts(*self) + 2 * pair_parts(*self))
            + self.heads * (kept_parts(*self) + KEPT);
        tile * tiles + 4 * (stage + terms + self.team.units) + ALIGNMENT
    }
}

/// Sizes of the operands.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Sizes {
    pub(crate) batch: usize,
    pub(crate) length: usize,
    pub(crate) heads: usize,
    pub(crate) headdim: usize,
    pub(crate) groups: usize,
    pub(crate) state: usize,
}

impl Sizes {
    /// The sizes where every head is treated as so many.
    pub(super) fn in_parts(self, parts: usize) -> Self {
        Self {
            heads: self.heads * parts,
            headdim: self.headdim / parts,
            ..self
        }
    }

    pub(super) fn heads_per_group(&self) -> usize {
        self.heads / self.groups
    }
}

/// Chooses the chunk and the heads of a tile for a device.
pub(super) fn plan(
    client: &Client,
    sizes: &Sizes,
    vectors: [usize; 2],
    softplus: bool,
    skip: bool,
    tile: DType,
) -> Option<Plan> {
    let team = Team::new(client, 256, tile);
    let hardware = &client.properties().hardware;
    // On a CPU shared memory is plain memory; what the runtime reports there is its first cache, and
    // short chunks stay in it.
    let cpu = hardware.plane_size_max == 1;
    let memory = if cpu {
        usize::MAX
    } else {
        hardware.max_shared_memory_size
    };
    let padded = sizes.headdim.next_multiple_of(SIDE);
    // About 64 channels to a tile: heads enough to fill it that divide a group.
    let wanted = (64 / padded).max(1).min(sizes.heads_per_group());
    let candidates = [
        (64, wanted),
        (64, 1),
        (32, wanted),
        (32, 1),
        (16, wanted),
        (16, 1),
    ];
    let longest = if cpu { 16 } else { 64 };
    candidates.into_iter().find_map(|(chunk, heads)| {
        if chunk > longest {
            return None;
        }
        let heads = (1..=heads)
            .rev()
            .find(|n| sizes.heads_per_group().is_multiple_of(*n))?;
        let plan = Plan {
            chunk,
            state: sizes.state,
            headdim: sizes.headdim,
            parts: 1,
            heads,
            vector_x: vectors[0],
            vector_n: vectors[1],
            softplus,
            skip,
            team,
            fragments: false,
            // A cube of many heads finds them once for all of those: measured, that is no slower.
            scores_given: heads == 1 && sizes.heads_per_group() > 1,
            two_chunks: false,
            two_tiles: false,
            state_parts: 1,
            row_blocks: 1,
            kept_as_tile: states_dtype(tile) == tile,
        };
        let plan = Plan {
            fragments: has_fragments(client, tile) && plan.suits_fragments(hardware),
            two_chunks: plan.is_short_of_registers()
                && plan.forward_bytes(2) <= memory / (OUTPUT_UNITS / plan.forward_units()).max(1),
            two_tiles: gradients_matrix::bytes(Plan {
                two_tiles: true,
                ..plan
            }) <= memory,
            ..plan
        };
        (plan.gradient_bytes(tile.size()) <= memory).then_some(plan)
    })
}

/// Numbers of a call.
#[derive(CubeType, CubeLaunch, Clone)]
pub(super) struct Call {
    /// Cubes with work.
    pub(super) cubes: usize,
    pub(super) length: usize,
    pub(super) chunks: usize,
    pub(super) heads: usize,
    pub(super) groups: usize,
    /// Runs of chunks that are walked side by side, and chunks of a run.
    pub(super) segments: usize,
    pub(super) per_segment: usize,
    /// Tiles of channels that one cube treats.
    pub(super) tiles: usize,
    pub(super) x: Place,
    pub(super) b: Place,
    pub(super) c: Place,
    pub(super) dt: Place,
    /// Of y forwards, of dx backwards.
    pub(super) out: Place,
    pub(super) db: Place,
    pub(super) dc: Place,
    pub(super) ddt: Place,
}
