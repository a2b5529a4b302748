/// Latent consistency models (Luo et al., 2023): few steps, each to a clean picture and back to less noise.
struct LCM: Scheduler {
    let timesteps: [Double]
    let table: NoiseTable
    let prediction: PredictionType
    private let clip: Float?
    private let scaling: Float
    private let steps: Int
    var position = 0

    init(_ configuration: SchedulerConfiguration, steps: Int) throws {
        try configuration.refuse("thresholding", unless: ["false"])
        prediction = try configuration.choice("prediction_type", .epsilon)
        table = try NoiseTable(
            configuration, defaults: BetaDefaults(start: 0.00085, end: 0.012, schedule: .scaledLinear),
            readsZeroSNR: true)
        clip = try configuration.clip(byDefault: false)
        scaling = Float(try configuration.number("timestep_scaling", 10))
        let trained = try configuration.integer("original_inference_steps", 50)
        guard (1...table.count).contains(trained), steps <= trained else {
            throw DiffusionError.input(
                "scheduler lcm cannot take as many as \(steps) steps: use at most \(min(trained, table.count))")
        }
        self.steps = steps
        let stride = table.count / trained
        timesteps = (0..<steps).map { index in
            let chosen = trained - 1 - Int(Double(index) * (Double(trained) / Double(steps)))
            return Double((chosen + 1) * stride - 1)
        }
    }

    mutating func step(_ output: Tensor, _ sample: Tensor, draw: (Tensor) throws -> Tensor) throws -> Tensor {
        let timestep = Int(timesteps[position])
        let alpha = table.alphas[timestep]
        let clean = cleaned(sample, output, alpha: alpha.squareRoot(), sigma: (1 - alpha).squareRoot()).clipped(clip)
        let scaled = Float(timestep) * scaling
        let sum = scaled * scaled + 0.25
        let denoised = clean.combined(scaled / sum.squareRoot(), 0.25 / sum, sample)
        position += 1
        guard position < steps else { return denoised }
        let next = table.alphas[Int(timesteps[position])]
        return mixed(denoised, try draw(output), alpha: next)
    }
}
