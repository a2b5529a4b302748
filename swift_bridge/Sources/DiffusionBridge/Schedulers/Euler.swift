/// Euler's method (Karras et al., 2022, algorithm 2 without churn).
struct Euler: SigmaScheduler {
    let table: NoiseTable
    let prediction: PredictionType
    let spacing: SigmaSpacing
    var position = 0

    init(_ configuration: SchedulerConfiguration, steps: Int) throws {
        try configuration.refuseUnknownSpacings()
        prediction = try configuration.choice("prediction_type", .epsilon)
        table = try NoiseTable(configuration, readsZeroSNR: true, keepsLastFinite: true)
        spacing = try SigmaSpacing(configuration, table, steps: steps, allowsKarras: true)
    }

    mutating func step(_ output: Tensor, _ sample: Tensor, draw: (Tensor) throws -> Tensor) throws -> Tensor {
        let sigma = spacing.sigmas[position]
        let change = spacing.sigmas[position + 1] - sigma
        position += 1
        return sample.combined(1, change, derivative(sample, output, sigma))
    }
}

/// Euler's method with fresh noise at every step ("ancestral" sampling).
struct EulerAncestral: SigmaScheduler {
    let table: NoiseTable
    let prediction: PredictionType
    let spacing: SigmaSpacing
    var position = 0

    init(_ configuration: SchedulerConfiguration, steps: Int) throws {
        prediction = try configuration.choice("prediction_type", .epsilon)
        guard prediction != .sample else {
            throw DiffusionError.input(
                "scheduler euler-ancestral: prediction type sample: expected epsilon or v_prediction")
        }
        table = try NoiseTable(configuration, readsZeroSNR: true, keepsLastFinite: true)
        let plain = configuration.setting(["final_sigmas_type": .null])
        spacing = try SigmaSpacing(plain, table, steps: steps, allowsKarras: false)
    }

    mutating func step(_ output: Tensor, _ sample: Tensor, draw: (Tensor) throws -> Tensor) throws -> Tensor {
        let (from, to) = (spacing.sigmas[position], spacing.sigmas[position + 1])
        let up = (to * to * (from * from - to * to) / (from * from)).squareRoot()
        let down = (to * to - up * up).squareRoot()
        let moved = sample.combined(1, down - from, derivative(sample, output, from))
        position += 1
        return moved.combined(1, up, try draw(output))
    }
}
