/// One way from noise to latents. A scheduler is made for a number of steps and used up by them.
protocol Scheduler {
    /// One for each call of the UNet, descending; not whole numbers for some.
    var timesteps: [Double] { get }
    /// How many calls of the UNet one step takes.
    var order: Int { get }
    /// What standard normal noise is multiplied by to be the first latents.
    var initialNoise: Float { get }
    /// The share of the picture at each timestep of the training.
    var table: NoiseTable { get }
    /// What the UNet predicts.
    var prediction: PredictionType { get }
    /// The call that comes next. Changing a picture leaves out those before it.
    var position: Int { get set }

    /// The latents as the UNet wants to see them in the next call.
    func scaled(_ sample: Tensor) -> Tensor
    /// The latents after a call of the UNet. `draw` gives standard normal values.
    mutating func step(_ output: Tensor, _ sample: Tensor, draw: (Tensor) throws -> Tensor) throws -> Tensor
    /// Clean latents at the noise level of call `index`.
    func noised(_ clean: Tensor, _ noise: Tensor, at index: Int) -> Tensor
}

extension Scheduler {
    var order: Int { 1 }
    var initialNoise: Float { 1 }
    func scaled(_ sample: Tensor) -> Tensor { sample }

    func noised(_ clean: Tensor, _ noise: Tensor, at index: Int) -> Tensor {
        mixed(clean, noise, alpha: table.alphas[min(Int(timesteps[index]), table.count - 1)])
    }

    /// The first call that changing a picture by `strength` makes, in (0, 1]. Throws where no step would remain.
    func firstCall(steps: Int, strength: Double) throws -> Int {
        guard strength.isFinite, strength > 0, strength <= 1 else {
            throw DiffusionError.input(
                "strength \(strength): expected more than 0 (no change) and at most 1 (a new picture)")
        }
        let skipped = max(steps - min(Int(Double(steps) * strength), steps), 0) * order
        guard skipped < timesteps.count, skipped < steps * order else {
            throw DiffusionError.input(
                "strength \(strength) of \(steps) steps leaves no step: give more strength or more steps")
        }
        return skipped
    }

    /// Clean latents from latents `alpha * clean + sigma * noise` and what the UNet predicts for them.
    func cleaned(_ sample: Tensor, _ output: Tensor, alpha: Float, sigma: Float) -> Tensor {
        prediction.cleaned(sample, output, alpha: alpha, sigma: sigma)
    }
}

extension PredictionType {
    /// Clean latents from latents `alpha * clean + sigma * noise` and what the UNet predicts for them.
    func cleaned(_ sample: Tensor, _ output: Tensor, alpha: Float, sigma: Float) -> Tensor {
        switch self {
        case .epsilon: sample.combined(1 / alpha, -sigma / alpha, output)
        case .velocity: sample.combined(alpha, -sigma, output)
        case .sample: output
        }
    }
}

/// The clean latents that a prediction amounts to under any scheduler: `x0 = (x - sqrt(1 - a) e) / sqrt(a)` with `a` the
/// share of the picture, as `input` is what the UNet saw (Song et al., DDIM, equation 9).
func estimated(
    _ input: Tensor, _ output: Tensor, _ timestep: Double, table: NoiseTable, prediction: PredictionType
) -> Tensor {
    let index = min(max(Int(timestep.rounded(.toNearestOrEven)), 0), table.count - 1)
    let alpha = table.alphas[index]
    // Where nothing is left of the picture, noise cannot be divided away; velocities need no division.
    let divisible = prediction == .velocity ? alpha : max(alpha, 1e-6)
    return prediction.cleaned(input, output, alpha: divisible.squareRoot(), sigma: (1 - alpha).squareRoot())
}

/// The latents at a noise level whose picture has the share `alpha` of the variance.
func mixed(_ clean: Tensor, _ noise: Tensor, alpha: Float) -> Tensor {
    clean.combined(alpha.squareRoot(), (1 - alpha).squareRoot(), noise)
}
