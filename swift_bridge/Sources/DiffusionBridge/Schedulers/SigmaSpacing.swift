/// The noise levels that schedulers of continuous time go through, and the timesteps at which the UNet sees them.
struct SigmaSpacing: Sendable {
    /// One for each step, and the last one's goal.
    let sigmas: [Float]
    let timesteps: [Double]
    /// What noise is multiplied by where the UNet's input is scaled.
    let initialNoise: Float

    /// For schedulers after Karras et al. (2022), Euler's, Heun's and the linear multistep one: timesteps are not
    /// rounded.
    init(_ configuration: SchedulerConfiguration, _ table: NoiseTable, steps: Int, allowsKarras: Bool) throws {
        let spacing = try configuration.choice("timestep_spacing", TimestepSpacing.linspace)
        var timesteps = Spacing.timesteps(
            spacing, steps, table, offset: try configuration.integer("steps_offset", 0)
        ).map { Double(Float($0)) }
        var levels = Spacing.sigmas(at: timesteps, in: table)
        if try allowsKarras && configuration.bool("use_karras_sigmas", false) {
            levels = Spacing.karras(
                from: try configuration.optionalNumber("sigma_max") ?? levels[0],
                to: try configuration.optionalNumber("sigma_min") ?? levels[steps - 1], steps)
            timesteps = levels.map { Double(Float(Spacing.timestep(ofSigma: $0, in: table))) }
        }
        let end: Float =
            try configuration.choice("final_sigmas_type", FinalSigmas.zero) == .zero ? 0 : table.sigmas[0]
        sigmas = levels.map(Float.init) + [end]
        self.timesteps = timesteps
        let largest = sigmas.max() ?? 0
        initialNoise = spacing == .leading ? (largest * largest + 1).squareRoot() : largest
    }
}

extension SchedulerConfiguration {
    /// Throw for the spacings of noise levels that no scheduler here has.
    func refuseUnknownSpacings() throws {
        for key in ["use_exponential_sigmas", "use_beta_sigmas", "use_lu_lambdas", "use_flow_sigmas", "thresholding"] {
            try refuse(key, unless: ["false"])
        }
        try refuse("interpolation_type", unless: ["linear"])
        try refuse("timestep_type", unless: ["discrete"])
    }
}

/// What the schedulers of continuous time share: latents are `clean + sigma * noise`.
protocol SigmaScheduler: Scheduler {
    var spacing: SigmaSpacing { get }
}

extension SigmaScheduler {
    var timesteps: [Double] { spacing.timesteps }
    var initialNoise: Float { spacing.initialNoise }

    func scaled(_ sample: Tensor) -> Tensor {
        let sigma = spacing.sigmas[position]
        let factor = 1 / (sigma * sigma + 1).squareRoot()
        return sample.mapped { $0 * factor }
    }

    func noised(_ clean: Tensor, _ noise: Tensor, at index: Int) -> Tensor {
        clean.combined(1, spacing.sigmas[index], noise)
    }

    /// The clean latents that a prediction at noise level `sigma` amounts to.
    func clean(_ sample: Tensor, _ output: Tensor, _ sigma: Float) -> Tensor {
        switch prediction {
        case .epsilon: sample.combined(1, -sigma, output)
        case .velocity:
            sample.combined(1 / (sigma * sigma + 1), -sigma / (sigma * sigma + 1).squareRoot(), output)
        case .sample: output
        }
    }

    /// `d = (x - clean) / sigma`, Karras et al., algorithm 2.
    func derivative(_ sample: Tensor, _ output: Tensor, _ sigma: Float) -> Tensor {
        sample.combined(1 / sigma, -1 / sigma, clean(sample, output, sigma))
    }
}
