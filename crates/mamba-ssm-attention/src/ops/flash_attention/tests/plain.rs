//! Attention and its gradients as loops in f64: nothing shared with the operator but the options.

use std::fmt;

use super::super::FlashAttentionOptions;
use super::super::dropout::{column_key, hash, row_key, seed_words, threshold};

/// Inputs of one call, row-major.
#[derive(Clone)]
pub struct Problem {
    shape: [usize; 6],
    pub options: FlashAttentionOptions,
    pub padding: Option<Vec<bool>>,
    pub q: Vec<f64>,
    pub k: Vec<f64>,
    pub v: Vec<f64>,
    pub dout: Vec<f64>,
}

/// Results of one call.
pub struct Solution {
    pub out: Vec<f64>,
    pub dq: Vec<f64>,
    pub dk: Vec<f64>,
    pub dv: Vec<f64>,
}

impl fmt::Display for Problem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let [b, h, hk, lq, lk, d] = self.shape;
        write!(
            f,
            "B{b} H{h}/{hk} L{lq}/{lk} D{d} {:?}, padding {}",
            self.options,
            self.padding.is_some()
        )
    }
}

/// Reproducible draws, roughly normal.
fn draws(n: usize, seed: usize) -> Vec<f64> {
    let mut x = seed as u64 * 0x9e37_79b9 + 12345;
    let mut uniform = move || {
        x = x
            .wrapping_mul(6364136223846793005)
            .wrapping_add(1442695040888963407);
        (x >> 11) as f64 / (1u64 << 53) as f64
    };
    (0..n)
        .map(|_| (0..6).map(|_| uniform() - 0.5).sum::<f64>() * 2f64.sqrt())
        .collect()
}

impl Problem {
    /// `shape`: batch, heads, key/value heads, length_q, length_k, head_dim.
    pub fn new(shape: [usize; 6], options: FlashAttentionOptions, seed: usize) -> Self {
        let [b, h, hk, lq, lk, d] = shape;
        Self {
            shape,
            options,
            padding: None,
            q: draws(b * h * lq * d, 4 * seed),
            k: draws(b * hk * lk * d, 4 * seed + 1),
            v: draws(b * hk * lk * d, 4 * seed + 2),
            dout: draws(b * h * lq * d, 4 * seed + 3),
        }
    }

    pub fn with_random_padding(mut self) -> Self {
        let n = self.shape[0] * self.shape[4];
        self.padding = Some(draws(n, 99).into_iter().map(|x| x > 0.4).collect());
        self
    }

    pub fn with_padded_sequence(mut self, batch: usize) -> Self {
        let lk = self.shape[4];
        self.padding = Some((0..self.shape[0] * lk).map(|n| n / lk == batch).collect());
        self
    }

    pub fn q_shape(&self) -> [usize; 4] {
        let [b, h, _, lq, _, d] = self.shape;
        [b, h, lq, d]
    }

    pub fn kv_shape(&self) -> [usize; 4] {
        let [b, _, hk, _, lk, d] = self.shape;
        [b, hk, lk, d]
    }

    fn sees(&self, batch: usize, i: usize, j: usize) -> bool {
        let [_, _, _, lq, lk, _] = self.shape;
        if self.padding.as_ref().is_some_and(|p| p[batch * lk + j]) {
            return false;
        }
        let ahead = j as i128 - (i as i128 + lk as i128 - lq as i128);
        let window = self.options.window.map_or(i128::MAX, |w| w as i128);
        ahead > -window
            && if self.options.causal {
                ahead <= 0
            } else {
                ahead < window
            }
    }

    /// Factor of a probability by dropout.
    fn kept(&self, plane: usize, i: usize, j: usize) -> f64 {
        match &self.options.dropout {
            Some(dropout) => {
                let words = seed_words(dropout.seed);
                let h = hash(row_key(words, plane, i), column_key(words, j));
                if h < threshold(dropout) {
                    1.0 / (1.0 - dropout.prob)
                } else {
                    0.0
                }
            }
            None => 1.0,
        }
    }

    pub fn solve(&self) -> Solution {
        let [b, h, hk, lq, lk, d] = self.shape;
        let scale = self.options.scale.unwrap_or(1.0 / (d as f64).sqrt());
        let mut s = Solution {
            out: vec![0.0; self.q.len()],
            dq: vec![0.0; self.q.len()],
            dk: vec![0.0; self.k.len()],
            dv: vec![0.0; self.v.len()],
        };
        let dot = |a: &[f64], b: &[f64]| a.iter().zip(b).map(|(x, y)| x * y).sum::<f64>();
        for plane in 0..b * h {
            let (batch, head) = (plane / h, plane % h);
            let kv = (batch * hk + head / (h / hk)) * lk * d;
            for i in 0..lq {
                let row = (plane * lq + i) * d;
                let row = row..row + d;
                let (q, dout) = (&self.q[row.clone()], &self.dout[row.clone()]);
                let seen: Vec<usize> = (0..lk).filter(|&j| self.sees(batch, i, j)).collect();
                let at = |j: usize| kv + j * d..kv + (j + 1) * d;
                let scores: Vec<f64> = seen
                    .iter()
                    .map(|&j| scale * dot(q, &self.k[at(j)]))
                    .collect();
                let top = scores.iter().copied().fold(f64::NEG_INFINITY, f64::max);
                let sum: f64 = scores.iter().map(|x| (x - top).exp()).sum();
                let p: Vec<f64> = scores.iter().map(|x| (x - top).exp() / sum).collect();
                let keep: Vec<f64> = seen.iter().map(|&j| self.kept(plane, i, j)).collect();
                let dp: Vec<f64> = seen
                    .iter()
                    .zip(&keep)
                    .map(|(&j, z)| z * dot(dout, &self.v[at(j)]))
                    .collect();
                let mean: f64 = p.iter().zip(&dp).map(|(p, g)| p * g).sum();
                for (n, &j) in seen.iter().enumerate() {
                    let ds = scale * p[n] * (dp[n] - mean);
                    for c in 0..d {
                        s.out[row.start + c] += p[n] * keep[n] * self.v[kv + j * d + c];
                        s.dv[kv + j * d + c] += p[n] * keep[n] * dout[c];
                        s.dq[row.start + c] += ds * self.k[kv + j * d + c];
                        s.dk[kv + j * d + c] += ds * q[c];
                    }
                }
            }
        }
        s
    }
}
