//! Backward pass (FlashAttention-2, algorithm 2): scores are computed again, tile by tile, from the
//! inputs and the log-sum-exp.
//!
//! With `p` the probabilities, `z` the dropout factors and `delta[i] = dout[i] . out[i]`:
//! `dv = (p z)ᵀ dout`, `ds = p (z (dout vᵀ) - delta)`, `dq = scale ds k`, `dk = scale dsᵀ q`.

use std::ops::Range;

use super::forward::Inputs;
use super::simd::{Isa, Left, Real, dispatch};
use super::tile::{COLUMNS, Plane, ROWS, wide};

/// What the forward pass left of one plane, and the gradient that comes in.
#[derive(Clone, Copy)]
pub(super) struct Outputs<'a, T> {
    pub(super) dout: Plane<'a, T>,
    pub(super) lse: &'a [T],
    pub(super) delta: &'a [T],
}

/// Memory of one worker.
pub(super) struct Scratch<T> {
    q: Vec<T>,
    dout: Vec<T>,
    keys: Vec<T>,
    keys_transposed: Vec<T>,
    values_transposed: Vec<T>,
    p: Vec<T>,
    ds: Vec<T>,
    factors: Vec<T>,
    dk: Vec<T>,
    dv: Vec<T>,
    dq: Vec<T>,
}

impl<T: Real> Scratch<T> {
    pub(super) fn new(dim: usize) -> Self {
        let zeros = |n| vec![T::ZERO; n];
        let (rows, columns) = (ROWS * wide(dim), COLUMNS * wide(dim));
        Self {
            q: zeros(rows),
            dout: zeros(rows),
            keys: zeros(columns),
            keys_transposed: zeros(columns),
            values_transposed: zeros(columns),
            p: zeros(ROWS * COLUMNS),
            ds: zeros(ROWS * COLUMNS),
            factors: zeros(ROWS * COLUMNS),
            dk: zeros(columns),
            dv: zeros(columns),
            dq: zeros(rows),
        }
    }

    #[inline(always)]
    fn load_queries(
        &mut self,
        inputs: &Inputs<'_, T>,
        outputs: &Outputs<'_, T>,
        rows: &Range<usize>,
    ) {
        let factor = T::from_f64(inputs.sight.spec.scale * std::f64::consts::LOG2_E);
        inputs.q.pack(rows.clone(), factor, &mut self.q);
        outputs.dout.pack(rows.clone(), T::ONE, &mut self.dout);
    }

    #[inline(always)]
    fn load_keys(&mut self, inputs: &Inputs<'_, T>, columns: &Range<usize>) {
        inputs.k.pack(columns.clone(), T::ONE, &mut self.keys);
        inputs
            .k
            .pack_transposed(columns.clone(), &mut self.keys_transposed);
        inputs
            .v
            .pack_transposed(columns.clone(), &mut self.values_transposed);
    }

    /// Leaves `p z` in `p` and `ds / scale` in `ds` for the loaded queries and keys.
    #[inline(always)]
    fn scores<S: Isa>(
        &mut self,
        inputs: &Inputs<'_, T>,
        outputs: &Outputs<'_, T>,
        rows: &Range<usize>,
        columns: &Range<usize>,
    ) {
        let (dim, wide) = (inputs.q.dim, wide(inputs.q.dim));
        let shape = [rows.len().next_multiple_of(8), dim, COLUMNS];
        self.p.fill(T::ZERO);
        self.ds.fill(T::ZERO);
        S::product(
            shape,
            Left::Rows(&self.q, wide),
            &self.keys_transposed,
            &mut self.p,
        );
        S::product(
            shape,
            Left::Rows(&self.dout, wide),
            &self.values_transposed,
            &mut self.ds,
        );
        inputs.sight.hide(rows, columns, &mut self.p);

        let dropout = inputs.sight.spec.dropout;
        if let Some(dropout) = &dropout {
            self.factors.fill(T::ONE);
            inputs.sight.drop(dropout, rows, columns, &mut self.factors);
        }
        let log2e = T::from_f64(std::f64::consts::LOG2_E);
        for (r, i) in rows.clone().enumerate() {
            let line = r * COLUMNS..(r + 1) * COLUMNS;
            let (lse, delta) = (outputs.lse[i] * log2e, outputs.delta[i]);
            let (p, ds) = (&mut self.p[line.clone()], &mut self.ds[line.clone()]);
            // A loop for each thing that is written: one that writes two is taken number by number.
            for p in p.iter_mut() {
                *p = (*p - lse).exp2();
            }
            if dropout.is_some() {
                let factors = &self.factors[line];
                for ((ds, p), z) in ds.iter_mut().zip(p.iter()).zip(factors) {
                    *ds = *p * (*ds * *z - delta);
                }
                for (p, z) in p.iter_mut().zip(factors) {
                    *p *= *z;
                }
            } else {
                for (ds, p) in ds.iter_mut().zip(p.iter()) {
                    *ds = *p * (*ds - delta);
                }
            }
        }
    }
}

/// Copies packed rows times `factor` into rows of `dim` features.
#[inline(always)]
fn unpack<T: Real>(packed: &[T], dim: usize, factor: T, into: &mut [T]) {
    let rows = into
        .chunks_exact_mut(dim)
        .zip(packed.chunks_exact(wide(dim)));
    for (to, from) in rows {
        for (to, from) in to.iter_mut().zip(from) {
            *to = *from * factor;
        }
    }
}

dispatch! {
    /// Writes the gradients of the keys and values `columns`, `[columns, dim]` each, summed over the
    /// query planes `heads` that share them. With `dq`, `[heads, lq, wide(dim)]`, adds
    /// `dq / scale` of these keys to it as well.
    pub(super) fn backward_keys<T>(
        heads: &[(Inputs<'_, T>, Outputs<'_, T>)],
        columns: Range<usize>,
        scratch: &mut Scratch<T>,
        dk: &mut [T],
        dv: &mut [T],
        dq: Option<&mut [T]>,
    ) = keys_body
}

#[inline(always)]
fn keys_body<T: Real, S: Isa>(
    heads: &[(Inputs<'_, T>, Outputs<'_, T>)],
    columns: Range<usize>,
    scratch: &mut Scratch<T>,
    dk: &mut [T],
    dv: &mut [T],
    mut dq: Option<&mut [T]>,
) {
    let Inputs { q, sight, .. } = heads[0].0;
    let (dim, wide, lq) = (q.dim, wide(q.dim), sight.lq);
    scratch.load_keys(&heads[0].0, &columns);
    scratch.dk.fill(T::ZERO);
    scratch.dv.fill(T::ZERO);
    for (head, (inputs, outputs)) in heads.iter().enumerate() {
        for start in (0..lq).step_by(ROWS) {
            let rows = start..(start + ROWS).min(lq);
            if !sight.meet(&rows, &columns) {
                continue;
            }
            scratch.load_queries(inputs, outputs, &rows);
            scratch.scores::<S>(inputs, outputs, &rows, &columns);
            let shape = [COLUMNS, rows.len(), wide];
            let (p, ds) = (&scratch.p, &scratch.ds);
            S::product(
                shape,
                Left::Columns(p, COLUMNS),
                &scratch.dout,
                &mut scratch.dv,
            );
            S::product(
                shape,
                Left::Columns(ds, COLUMNS),
                &scratch.q,
                &mut scratch.dk,
            );
            if let Some(dq) = &mut dq {
                let shape = [rows.len().next_multiple_of(8), columns.len(), wide];
                scratch.dq.fill(T::ZERO);
                S::product(
                    shape,
                    Left::Rows(&scratch.ds, COLUMNS),
                    &scratch.keys,
                    &mut scratch.dq,
                );
                let into = &mut dq[(head * lq + start) * wide..][..rows.len() * wide];
                for (to, from) in into.iter_mut().zip(&scratch.dq) {
                    *to += *from;
                }
            }
        }
    }
    // The packed queries hold scale * log2(e).
    unpack(&scratch.dk, dim, T::from_f64(std::f64::consts::LN_2), dk);
    unpack(&scratch.dv, dim, T::ONE, dv);
}

dispatch! {
    /// Writes the gradient of the queries `rows`, `[rows, dim]`.
    pub(super) fn backward_queries<T>(
        inputs: &Inputs<'_, T>,
        outputs: &Outputs<'_, T>,
        rows: Range<usize>,
        scratch: &mut Scratch<T>,
        dq: &mut [T],
    ) = queries_body
}

#[inline(always)]
fn queries_body<T: Real, S: Isa>(
    inputs: &Inputs<'_, T>,
    outputs: &Outputs<'_, T>,
    rows: Range<usize>,
    scratch: &mut Scratch<T>,
    dq: &mut [T],
) {
    let Inputs { q, sight, .. } = inputs;
    let (dim, wide) = (q.dim, wide(q.dim));
    scratch.load_queries(inputs, outputs, &rows);
    scratch.dq.fill(T::ZERO);
    for start in sight.key_tiles(&rows) {
        let columns = start..(start + COLUMNS).min(sight.lk);
        scratch.load_keys(inputs, &columns);
        scratch.scores::<S>(inputs, outputs, &rows, &columns);
        let shape = [rows.len().next_multiple_of(8), columns.len(), wide];
        S::product(
            shape,
            Left::Rows(&scratch.ds, COLUMNS),
            &scratch.keys,
            &mut scratch.dq,
        );
    }
    unpack(&scratch.dq, dim, T::from_f64(sight.spec.scale), dq);
}

/// Writes `dq`, `[rows, dim]`, from the sums that [`backward_keys`] left.
pub(super) fn finish_queries<T: Real>(sums: &[T], dim: usize, scale: f64, dq: &mut [T]) {
    unpack(sums, dim, T::from_f64(scale), dq);
}
