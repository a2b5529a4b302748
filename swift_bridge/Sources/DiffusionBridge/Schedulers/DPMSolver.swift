import Foundation

/// DPM-Solver++ (Lu et al., 2022) and its stochastic form, to second order.
enum DPMAlgorithm: String, CaseIterable {
    case ordinary = "dpmsolver++"
    case stochastic = "sde-dpmsolver++"
}

enum DPMType: String, CaseIterable {
    case midpoint, heun
    // The names that other solvers' configurations have; diffusers takes them for midpoint.
    case logrho, bh1, bh2
}

/// What both forms read of a configuration.
private struct DPMSettings {
    let prediction: PredictionType
    let isStochastic: Bool
    let isHeun: Bool
    let order: Int

    init(_ configuration: SchedulerConfiguration) throws {
        try configuration.refuseUnknownSpacings()
        try configuration.refuse("solver_order", unless: ["1", "2"])
        // A learned variance would come out of the UNet beside the prediction.
        let fixed = ["fixed_small", "fixed_small_log", "fixed_large", "fixed_large_log"]
        try configuration.refuse("variance_type", unless: Set(fixed))
        prediction = try configuration.choice("prediction_type", .epsilon)
        isStochastic = try configuration.choice("algorithm_type", DPMAlgorithm.ordinary) == .stochastic
        isHeun = try configuration.choice("solver_type", DPMType.midpoint) == .heun
        order = try configuration.integer("solver_order", 2)
    }
}

/// One update: from the latents at level `from` to level `to` with clean latents `picture`, and for the second order
/// their `slope` in lambda. `noise` is nil for the ordinary form.
private func moved(
    _ sample: Tensor, from: Level, to: Level, picture: Tensor, slope: Tensor?, noise: Tensor?, isHeun: Bool
) -> Tensor {
    let h = to.lambda - from.lambda
    let ratio = to.sigma / from.sigma
    var terms: [(Float, Tensor)]
    if let noise {
        let decay = exp(-2 * h)
        terms = [(ratio * exp(-h), sample), (to.alpha * (1 - decay), picture)]
        if let slope {
            terms.append((to.alpha * (isHeun ? (1 - decay) / (-2 * h) + 1 : 0.5 * (1 - decay)), slope))
        }
        terms.append((to.sigma * (1 - decay).squareRoot(), noise))
    } else {
        let growth = exp(-h) - 1
        terms = [(ratio, sample), (-to.alpha * growth, picture)]
        if let slope { terms.append((to.alpha * (isHeun ? growth / h + 1 : -0.5 * growth), slope)) }
    }
    return Tensor.combination(terms)
}

/// The multistep form: the second order comes from the step before.
struct DPMSolverMultistep: SolverScheduler {
    let table: NoiseTable
    let timesteps: [Double]
    let levels: [Float]
    var position = 0
    var prediction: PredictionType { settings.prediction }
    private let settings: DPMSettings
    private let endsInFirstOrder: Bool
    private var before: Tensor?

    init(_ configuration: SchedulerConfiguration, steps: Int) throws {
        settings = try DPMSettings(configuration)
        table = try NoiseTable(configuration, readsZeroSNR: true, keepsLastFinite: true)
        let last = table.count - (try SolverSpacing.clipped(configuration, table))
        let spacing = try SolverSpacing(
            configuration, table, steps: steps,
            timesteps: Spacing.multistepTimesteps(
                try configuration.choice("timestep_spacing", .linspace), steps, table,
                offset: try configuration.integer("steps_offset", 0), last: last))
        (timesteps, levels) = (spacing.timesteps, spacing.levels)
        let fewSteps = timesteps.count < 15
        endsInFirstOrder =
            try configuration.bool("euler_at_final", false)
            || (configuration.bool("lower_order_final", true) && fewSteps)
            || configuration.choice("final_sigmas_type", FinalSigmas.zero) == .zero
    }

    mutating func step(_ output: Tensor, _ sample: Tensor, draw: (Tensor) throws -> Tensor) throws -> Tensor {
        let picture = clean(sample, output)
        let noise = settings.isStochastic ? try draw(output) : nil
        let (from, to) = (Level(levels[position]), Level(levels[position + 1]))
        var slope: Tensor?
        let isLast = position == timesteps.count - 1
        if let before, settings.order > 1, !(isLast && endsInFirstOrder) {
            let earlier = Level(levels[position - 1])
            let share = (from.lambda - earlier.lambda) / (to.lambda - from.lambda)
            slope = picture.combined(1 / share, -1 / share, before)
        }
        before = picture
        position += 1
        return moved(sample, from: from, to: to, picture: picture, slope: slope, noise: noise, isHeun: settings.isHeun)
    }
}

/// The singlestep form: every second call starts again from the latents of the call before.
struct DPMSolverSinglestep: SolverScheduler {
    let table: NoiseTable
    let timesteps: [Double]
    let levels: [Float]
    var position = 0
    var prediction: PredictionType { settings.prediction }
    private let settings: DPMSettings
    private let orders: [Int]
    private var before: Tensor?
    private var start: Tensor?

    init(_ configuration: SchedulerConfiguration, steps: Int) throws {
        settings = try DPMSettings(configuration)
        table = try NoiseTable(configuration)
        let last = table.count - (try SolverSpacing.clipped(configuration, table))
        let spread = Spacing.multistepTimesteps(.linspace, steps, table, offset: 0, last: last)
        let spacing = try SolverSpacing(configuration, table, steps: steps, timesteps: spread)
        (timesteps, levels) = (spacing.timesteps, spacing.levels)
        orders = Self.orders(
            steps, solverOrder: settings.order,
            endsAtZero: try configuration.choice("final_sigmas_type", FinalSigmas.zero) == .zero,
            endsLower: try configuration.bool("lower_order_final", false))
    }

    /// The order of each step. diffusers lowers that of the last where it must, whatever the configuration says.
    private static func orders(_ steps: Int, solverOrder: Int, endsAtZero: Bool, endsLower: Bool) -> [Int] {
        guard solverOrder == 2 else { return [Int](repeating: 1, count: steps) }
        var orders = (0..<steps).map { $0 % 2 + 1 }
        if endsAtZero || endsLower || steps % 2 != 0 { orders[steps - 1] = 1 }
        return orders
    }

    mutating func step(_ output: Tensor, _ sample: Tensor, draw: (Tensor) throws -> Tensor) throws -> Tensor {
        let picture = clean(sample, output)
        let noise = settings.isStochastic ? try draw(output) : nil
        let to = Level(levels[position + 1])
        defer {
            before = picture
            position += 1
        }
        guard orders[position] == 2, let before, let start else {
            start = sample
            return moved(
                sample, from: Level(levels[position]), to: to, picture: picture, slope: nil, noise: noise,
                isHeun: settings.isHeun)
        }
        let (middle, from) = (Level(levels[position]), Level(levels[position - 1]))
        let share = (middle.lambda - from.lambda) / (to.lambda - from.lambda)
        let slope = picture.combined(1 / share, -1 / share, before)
        return moved(start, from: from, to: to, picture: before, slope: slope, noise: noise, isHeun: settings.isHeun)
    }
}
