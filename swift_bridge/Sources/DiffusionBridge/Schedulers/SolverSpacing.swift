import Foundation

/// What the solvers in half the logarithm of the signal-to-noise ratio share (Lu et al., DPM-Solver, 2022): latents are
/// `alpha * clean + sigma * noise` with `alpha^2 + sigma^2 = 1`.
protocol SolverScheduler: Scheduler {
    /// The noise level of each step relative to the picture, and the last one's goal.
    var levels: [Float] { get }
}

extension SolverScheduler {
    func noised(_ clean: Tensor, _ noise: Tensor, at index: Int) -> Tensor {
        let level = Level(levels[index])
        return clean.combined(level.alpha, level.sigma, noise)
    }

    /// The clean latents that a prediction at this step amounts to.
    func clean(_ sample: Tensor, _ output: Tensor) -> Tensor {
        let level = Level(levels[position])
        return cleaned(sample, output, alpha: level.alpha, sigma: level.sigma)
    }
}

/// One noise level in three forms, in float32 as diffusers computes them.
struct Level {
    let alpha: Float
    let sigma: Float
    /// `log(alpha / sigma)`
    let lambda: Float

    init(_ ratio: Float) {
        alpha = 1 / (ratio * ratio + 1).squareRoot()
        sigma = ratio * alpha
        lambda = log(alpha) - log(sigma)
    }
}

/// Timesteps and noise levels of the multistep solvers.
struct SolverSpacing {
    let timesteps: [Double]
    let levels: [Float]

    /// `rounded` timesteps are those of the training. `timesteps` is how they are spread where Karras's spacing of
    /// noise levels is not asked for.
    init(
        _ configuration: SchedulerConfiguration, _ table: NoiseTable, steps: Int, timesteps spread: [Double],
        endsAtOwnMinimum: Bool = false
    ) throws {
        var levels: [Double]
        if try configuration.bool("use_karras_sigmas", false) {
            levels = Spacing.karras(
                from: try configuration.optionalNumber("sigma_max") ?? Double(table.sigmas[table.count - 1]),
                to: try configuration.optionalNumber("sigma_min") ?? Double(table.sigmas[0]), steps)
            timesteps = levels.map { Spacing.roundedToEven(Spacing.timestep(ofSigma: $0, in: table)) }
        } else {
            levels = Spacing.sigmas(at: spread, in: table)
            timesteps = spread
        }
        switch try configuration.choice("final_sigmas_type", FinalSigmas.zero) {
        case .zero: levels.append(0)
        case .minimum:
            let karras = try configuration.bool("use_karras_sigmas", false)
            levels.append(endsAtOwnMinimum && karras ? levels[steps - 1] : Double(table.sigmas[0]))
        }
        self.levels = levels.map(Float.init)
    }

    /// How many of the table's timesteps are left out for being noisier than `lambda_min_clipped` allows.
    static func clipped(_ configuration: SchedulerConfiguration, _ table: NoiseTable) throws -> Int {
        let least = Float(try configuration.number("lambda_min_clipped", -.infinity))
        return table.alphas.count { log($0.squareRoot()) - log((1 - $0).squareRoot()) < least }
    }
}
