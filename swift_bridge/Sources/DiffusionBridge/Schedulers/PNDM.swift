/// Pseudo linear multistep (Liu et al., "Pseudo numerical methods for diffusion models on manifolds", ICLR 2022),
/// without Runge-Kutta steps. The second timestep is repeated.
struct PNDM: Scheduler {
    let timesteps: [Double]
    let table: NoiseTable
    let prediction: PredictionType
    private let last: Float
    private let stride: Int
    var position = 0
    private var calls = 0
    private var outputs: [Tensor] = []
    private var first: Tensor?

    init(_ configuration: SchedulerConfiguration, steps: Int) throws {
        try configuration.refuse("skip_prk_steps", unless: ["true"])
        prediction = try configuration.choice("prediction_type", .epsilon)
        guard prediction != .sample else {
            throw DiffusionError.input("scheduler pndm: prediction type sample: expected epsilon or v_prediction")
        }
        table = try NoiseTable(configuration)
        last = try configuration.bool("set_alpha_to_one", false) ? 1 : table.alphas[0]
        stride = table.count / steps
        let spread = Spacing.timesteps(
            try configuration.choice("timestep_spacing", .leading), steps, table,
            offset: try configuration.integer("steps_offset", 0)
        ).map(Spacing.roundedToEven)
        // The last but one of the ascending list comes twice; with one step there is no such.
        timesteps = spread.count > 1 ? [spread[0], spread[1], spread[1]] + spread.dropFirst(2) : spread
    }

    mutating func step(_ output: Tensor, _ sample: Tensor, draw: (Tensor) throws -> Tensor) throws -> Tensor {
        var timestep = Int(timesteps[position])
        var previous = timestep - stride
        var from = sample
        if calls == 1 {
            (timestep, previous) = (timestep + stride, timestep)
        } else {
            outputs = outputs.suffix(3) + [output]
        }
        let direction: Tensor
        switch (outputs.count, calls) {
        case (1, 0):
            direction = output
            first = sample
        case (1, 1):
            direction = output.combined(0.5, 0.5, outputs[0])
            from = first ?? sample
            first = nil
        default: direction = Self.extrapolated(outputs)
        }
        position += 1
        calls += 1
        return moved(from, direction, timestep, previous)
    }

    /// The multistep formula of as many outputs as there are (Adams and Bashforth).
    private static func extrapolated(_ outputs: [Tensor]) -> Tensor {
        let factors: [Float] =
            switch outputs.count {
            case 1: [1]
            case 2: [3 / 2, -1 / 2]
            case 3: [23 / 12, -16 / 12, 5 / 12]
            default: [55 / 24, -59 / 24, 37 / 24, -9 / 24]
            }
        return Tensor.combination(Array(zip(factors, outputs.reversed())))
    }

    /// Equation 9 of the paper.
    private func moved(_ sample: Tensor, _ output: Tensor, _ timestep: Int, _ previous: Int) -> Tensor {
        let alpha = table.alphas[min(timestep, table.count - 1)]
        let next = previous >= 0 ? table.alphas[previous] : last
        let divisor = alpha * (1 - next).squareRoot() + (alpha * (1 - alpha) * next).squareRoot()
        let scale = (next / alpha).squareRoot()
        let amount = (next - alpha) / divisor
        guard prediction == .velocity else { return sample.combined(scale, -amount, output) }
        return sample.combined(
            scale - amount * (1 - alpha).squareRoot(), -amount * alpha.squareRoot(), output)
    }
}
