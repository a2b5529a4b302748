/// Denoising diffusion implicit models (Song et al., 2021), equation 12. `eta` is how much noise each step adds.
struct DDIM: Scheduler {
    let timesteps: [Double]
    let table: NoiseTable
    let prediction: PredictionType
    private let last: Float
    private let stride: Int
    private let clip: Float?
    private let eta: Float
    var position = 0

    init(_ configuration: SchedulerConfiguration, steps: Int, eta: Double) throws {
        try configuration.refuse("thresholding", unless: ["false"])
        prediction = try configuration.choice("prediction_type", .epsilon)
        table = try NoiseTable(configuration, readsZeroSNR: true)
        last = try configuration.bool("set_alpha_to_one", true) ? 1 : table.alphas[0]
        stride = table.count / steps
        clip = try configuration.clip(byDefault: true)
        self.eta = Float(eta)
        timesteps = Spacing.timesteps(
            try configuration.choice("timestep_spacing", .leading), steps, table,
            offset: try configuration.integer("steps_offset", 0)
        ).map(Spacing.roundedToEven)
    }

    mutating func step(_ output: Tensor, _ sample: Tensor, draw: (Tensor) throws -> Tensor) throws -> Tensor {
        let timestep = Int(timesteps[position])
        position += 1
        let alpha = table.alphas[min(timestep, table.count - 1)]
        let next = timestep - stride >= 0 ? table.alphas[timestep - stride] : last
        let (picture, noise) = (alpha.squareRoot(), (1 - alpha).squareRoot())
        var clean = cleaned(sample, output, alpha: picture, sigma: noise)
        let direction: Tensor =
            switch prediction {
            case .epsilon: output
            case .sample: sample.combined(1 / noise, -picture / noise, clean)
            case .velocity: output.combined(picture, noise, sample)
            }
        clean = clean.clipped(clip)
        let variance = (1 - next) / (1 - alpha) * (1 - alpha / next)
        let deviation = eta * variance.squareRoot()
        let forward = (1 - next - deviation * deviation).squareRoot()
        let moved = clean.combined(next.squareRoot(), forward, direction)
        return eta > 0 ? moved.combined(1, deviation, try draw(output)) : moved
    }
}
