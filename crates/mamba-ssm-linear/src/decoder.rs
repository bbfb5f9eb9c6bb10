use crate::Linear;
use crate::memory::host;
use crate::simd::{LANES, vectorized};

type Lanes = [f32; LANES];

/// Sums that one panel keeps, so that an addition need not wait for the one before.
const SUMS: usize = 4;

/// A [`Linear`] for one token at a time on the CPU: a copy of its parameters, laid out in the order in
/// which one token needs them. A step allocates nothing.
///
/// ```
/// use burn::tensor::{Device, Tensor};
/// use mamba_ssm_linear::LinearConfig;
///
/// let linear = LinearConfig::new(3, 20).init(&Device::default());
/// let decoder = linear.decoder();
/// let mut y = [0.0; 20];
/// decoder.step(&[1.0, 2.0, 3.0], &mut y);
/// let want = linear.forward(Tensor::<1>::from_floats([1.0, 2.0, 3.0], &Device::default()));
/// let off = (want - Tensor::from_floats(y, &Device::default())).abs().max();
/// assert!(off.into_scalar::<f32>() < 1e-5);
/// ```
#[derive(Debug, Clone)]
pub struct LinearDecoder {
    /// `[panels, d_input]`: of each input feature its weights to [`LANES`] neighbouring outputs.
    panels: Vec<Lanes>,
    /// `[panels]`.
    bias: Vec<Lanes>,
    d_input: usize,
    d_output: usize,
}

impl Linear {
    /// The projection for one token at a time. Later changes of the parameters do not reach it.
    pub fn decoder(&self) -> LinearDecoder {
        let [d_input, d_output] = self.weight.dims();
        let weight = host(&self.weight.val());
        let bias = self.bias.as_ref().map(|bias| host(&bias.val()));
        let count = d_output.div_ceil(LANES);
        let mut panels = vec![[0.0; LANES]; count * d_input];
        for (k, row) in weight.chunks_exact(d_output.max(1)).enumerate() {
            for (panel, outputs) in row.chunks(LANES).enumerate() {
                panels[panel * d_input + k][..outputs.len()].copy_from_slice(outputs);
            }
        }
        let mut biases = vec![[0.0; LANES]; count];
        if let Some(bias) = bias {
            biases.as_flattened_mut()[..d_output].copy_from_slice(&bias);
        }
        LinearDecoder {
            panels,
            bias: biases,
            d_input,
            d_output,
        }
    }
}

impl LinearDecoder {
    /// Features coming in.
    pub fn d_input(&self) -> usize {
        self.d_input
    }

    /// Features going out.
    pub fn d_output(&self) -> usize {
        self.d_output
    }

    /// One token: `y = x W + b`.
    ///
    /// # Panics
    ///
    /// When `x` has not `d_input` numbers or `y` not `d_output`.
    pub fn step(&self, x: &[f32], y: &mut [f32]) {
        assert_eq!(x.len(), self.d_input, "LinearDecoder: features of x");
        assert_eq!(y.len(), self.d_output, "LinearDecoder: features of y");
        vectorized(
            #[inline(always)]
            || self.product(x, y),
        );
    }

    #[inline(always)]
    fn product(&self, x: &[f32], y: &mut [f32]) {
        let panels = self.panels.chunks_exact(self.d_input.max(1));
        for ((panel, bias), y) in panels.zip(&self.bias).zip(y.chunks_mut(LANES)) {
            let sum = dot(panel, x, *bias);
            y.copy_from_slice(&sum[..y.len()]);
        }
    }
}

/// `start + sum_k x[k] panel[k]`.
#[inline(always)]
fn dot(panel: &[Lanes], x: &[f32], start: Lanes) -> Lanes {
    let mut sums = [[0.0; LANES]; SUMS];
    sums[0] = start;
    let (weights, weights_rest) = panel.as_chunks::<SUMS>();
    let (xs, xs_rest) = x.as_chunks::<SUMS>();
    for (weights, xs) in weights.iter().zip(xs) {
        for s in 0..SUMS {
            add_scaled(&mut sums[s], &weights[s], xs[s]);
        }
    }
    for (weights, x) in weights_rest.iter().zip(xs_rest) {
        add_scaled(&mut sums[0], weights, *x);
    }
    let mut sum = [0.0; LANES];
    for (l, sum) in sum.iter_mut().enumerate() {
        *sum = (sums[0][l] + sums[1][l]) + (sums[2][l] + sums[3][l]);
    }
    sum
}

#[inline(always)]
fn add_scaled(sum: &mut Lanes, by: &Lanes, x: f32) {
    for (sum, by) in sum.iter_mut().zip(by) {
        *sum += by * x;
    }
}

#[cfg(test)]
mod tests {
    use burn::tensor::{Device, Distribution, Tensor};

    use super::*;
    use crate::LinearConfig;

    #[test]
    fn a_step_is_the_projection_of_one_token() {
        let device = Device::default();
        device.seed(3);
        for (d_input, d_output, bias) in
            [(1, 1, true), (5, 64, true), (64, 656, false), (7, 33, true)]
        {
            let linear = LinearConfig::new(d_input, d_output)
                .with_bias(bias)
                .init(&device);
            let x = Tensor::<1>::random([d_input], Distribution::Default, &device);
            let mut y = vec![f32::NAN; d_output];
            linear.decoder().step(&host(&x), &mut y);
            for (y, want) in y.iter().zip(host(&linear.forward(x))) {
                assert!((y - want).abs() < 1e-5, "{y} is not {want}");
            }
        }
    }

    #[test]
    #[should_panic(expected = "features of x")]
    fn a_token_of_another_size_is_refused() {
        let linear = LinearConfig::new(3, 2).init(&Device::default());
        linear.decoder().step(&[1.0; 4], &mut [0.0; 2]);
    }
}
