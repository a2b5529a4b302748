/// Heun's method (Karras et al., 2022, algorithm 2): two calls of the UNet a step, but for the last.
struct Heun: SigmaScheduler {
    let table: NoiseTable
    let prediction: PredictionType
    let spacing: SigmaSpacing
    let timesteps: [Double]
    let order = 2
    var position = 0
    private let levels: [Float]
    private let clip: Float?
    /// What the first call of a step found: derivative, change of sigma, latents.
    private var begun: (derivative: Tensor, change: Float, sample: Tensor)?

    init(_ configuration: SchedulerConfiguration, steps: Int) throws {
        try configuration.refuseUnknownSpacings()
        prediction = try configuration.choice("prediction_type", .epsilon)
        table = try NoiseTable(configuration, defaults: BetaDefaults(start: 0.00085, end: 0.012))
        let plain = configuration.setting(["final_sigmas_type": .null])
        spacing = try SigmaSpacing(plain, table, steps: steps, allowsKarras: true)
        clip = try configuration.clip(byDefault: false)
        timesteps = spacing.timesteps.prefix(1) + spacing.timesteps.dropFirst().flatMap { [$0, $0] }
        levels = spacing.sigmas.prefix(1) + spacing.sigmas.dropFirst().dropLast().flatMap { [$0, $0] } + [0]
    }

    func scaled(_ sample: Tensor) -> Tensor {
        let factor = 1 / (levels[position] * levels[position] + 1).squareRoot()
        return sample.mapped { $0 * factor }
    }

    func noised(_ clean: Tensor, _ noise: Tensor, at index: Int) -> Tensor {
        clean.combined(1, levels[index], noise)
    }

    mutating func step(_ output: Tensor, _ sample: Tensor, draw: (Tensor) throws -> Tensor) throws -> Tensor {
        // In the second call of a step, this is the level that the first one reached.
        let sigma = levels[position]
        let picture = clean(sample, output, sigma).clipped(clip)
        let here = sample.combined(1 / sigma, -1 / sigma, picture)
        position += 1
        if let started = begun {
            begun = nil
            let mean = started.derivative.combined(0.5, 0.5, here)
            return started.sample.combined(1, started.change, mean)
        }
        let change = levels[position] - sigma
        begun = (here, change, sample)
        return sample.combined(1, change, here)
    }
}
