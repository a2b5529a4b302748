import Foundation

/// How much noise there is at each timestep of the training, in float32 as diffusers computes it.
struct NoiseTable: Sendable {
    /// The share of the picture that is left at each timestep ("alphas_cumprod").
    let alphas: [Float]
    /// The deviation of the noise where the picture has its full strength: `sqrt((1 - a) / a)`.
    let sigmas: [Float]

    /// The table of a configuration. `endsInNoise` applies `rescale_betas_zero_snr`; `keepsLastFinite` then leaves a
    /// trace of the picture in the last entry, as schedulers that divide by it need.
    init(
        _ configuration: SchedulerConfiguration, defaults: BetaDefaults = BetaDefaults(), readsZeroSNR: Bool = false,
        keepsLastFinite: Bool = false
    ) throws {
        var betas = try Self.betas(configuration, defaults)
        let endsInNoise = try readsZeroSNR && configuration.bool("rescale_betas_zero_snr", false)
        if endsInNoise { betas = Self.rescaled(betas) }
        var cumulative = Self.cumulativeAlphas(betas)
        if endsInNoise && keepsLastFinite { cumulative[cumulative.count - 1] = 0x1p-24 }
        alphas = cumulative
        sigmas = cumulative.map { ((1 - $0) / $0).squareRoot() }
    }

    var count: Int { alphas.count }

    private static func betas(_ configuration: SchedulerConfiguration, _ defaults: BetaDefaults) throws -> [Float] {
        if let trained = try configuration.numbers("trained_betas") { return trained.map(Float.init) }
        let count = try configuration.integer("num_train_timesteps", 1000)
        guard (1...1_000_000).contains(count) else {
            throw DiffusionError.package("scheduler: num_train_timesteps is \(count), expected at least 1")
        }
        let start = try configuration.number("beta_start", defaults.start)
        let end = try configuration.number("beta_end", defaults.end)
        switch try configuration.choice("beta_schedule", defaults.schedule) {
        case .linear: return linspace(Float(start), Float(end), count)
        case .scaledLinear: return linspace(Float(start.squareRoot()), Float(end.squareRoot()), count).map { $0 * $0 }
        case .cosine:
            let level = { (time: Double) in pow(cos((time + 0.008) / 1.008 * .pi / 2), 2) }
            return (0..<count).map { index in
                let now = level(Double(index) / Double(count))
                return Float(min(1 - level(Double(index + 1) / Double(count)) / now, 0.999))
            }
        }
    }

    /// `torch.linspace` in float32: the second half is counted from the end.
    private static func linspace(_ start: Float, _ end: Float, _ count: Int) -> [Float] {
        guard count > 1 else { return [start] }
        let step = (end - start) / Float(count - 1)
        return (0..<count).map { index in
            index < count / 2
                ? start.addingProduct(step, Float(index)) : end.addingProduct(-step, Float(count - index - 1))
        }
    }

    private static func cumulativeAlphas(_ betas: [Float]) -> [Float] {
        var product = 1.0
        return betas.map { beta in
            product *= Double(1 - beta)
            return Float(product)
        }
    }

    /// Betas whose last step holds no picture (Lin et al., "Common diffusion noise schedules and sample steps are
    /// flawed", algorithm 1).
    private static func rescaled(_ betas: [Float]) -> [Float] {
        let roots = cumulativeAlphas(betas).map { $0.squareRoot() }
        guard let first = roots.first, let last = roots.last else { return betas }
        let squares = roots.map { root in
            let shifted = (root - last) * (first / (first - last))
            return shifted * shifted
        }
        return squares.indices.map { index in
            1 - (index == 0 ? squares[0] : squares[index] / squares[index - 1])
        }
    }
}

/// What a scheduler assumes where its configuration does not say.
struct BetaDefaults: Sendable {
    var start = 0.0001
    var end = 0.02
    var schedule = BetaSchedule.linear
}

/// Arithmetic that numpy does in double precision.
enum Spacing {
    /// `numpy.linspace`, in ascending order.
    static func linspace(_ start: Double, _ end: Double, _ count: Int) -> [Double] {
        guard count > 1 else { return [start] }
        let step = (end - start) / Double(count - 1)
        return (0..<count).map { $0 == count - 1 ? end : Double($0) * step + start }
    }

    /// The timesteps of schedulers that take `steps` of those of the table, in descending order, not rounded where
    /// they are evenly spread ("linspace").
    static func timesteps(_ spacing: TimestepSpacing, _ steps: Int, _ table: NoiseTable, offset: Int) -> [Double] {
        switch spacing {
        case .linspace: linspace(0, Double(table.count - 1), steps).reversed()
        case .leading: (0..<steps).reversed().map { Double($0 * (table.count / steps) + offset) }
        case .trailing: trailing(from: table.count, steps, table)
        }
    }

    /// As above for multistep solvers, which leave the last of `steps + 1` out.
    static func multistepTimesteps(
        _ spacing: TimestepSpacing, _ steps: Int, _ table: NoiseTable, offset: Int, last: Int
    ) -> [Double] {
        switch spacing {
        case .linspace: linspace(0, Double(last - 1), steps + 1).dropFirst().reversed().map(roundedToEven)
        case .leading: (1...steps).reversed().map { Double($0 * (last / (steps + 1)) + offset) }
        case .trailing: trailing(from: last, steps, table)
        }
    }

    private static func trailing(from last: Int, _ steps: Int, _ table: NoiseTable) -> [Double] {
        let ratio = Double(table.count) / Double(steps)
        let count = Int((Double(last) / ratio).rounded(.up))
        return (0..<count).map { roundedToEven(Double(last) - Double($0) * ratio) - 1 }
    }

    static func roundedToEven(_ value: Double) -> Double {
        value.rounded(.toNearestOrEven)
    }

    /// The noise levels at timesteps between those of the table (`numpy.interp`).
    static func sigmas(at timesteps: [Double], in table: NoiseTable) -> [Double] {
        timesteps.map { timestep in
            let place = min(max(timestep, 0), Double(table.count - 1))
            let low = min(Int(place), max(table.count - 2, 0))
            let high = min(low + 1, table.count - 1)
            let (lower, upper) = (Double(table.sigmas[low]), Double(table.sigmas[high]))
            return lower + (upper - lower) * (place - Double(low))
        }
    }

    /// Noise levels from `maximum` down to `minimum` as Karras et al. (2022) space them, equation 5 with rho = 7.
    static func karras(from maximum: Double, to minimum: Double, _ steps: Int) -> [Double] {
        let (start, end) = (pow(maximum, 1 / 7.0), pow(minimum, 1 / 7.0))
        return linspace(0, 1, steps).map { pow(start + $0 * (end - start), 7) }
    }

    /// The timestep of a noise level, between those of the table.
    static func timestep(ofSigma sigma: Double, in table: NoiseTable) -> Double {
        let wanted = log(max(sigma, 1e-10))
        let logs = table.sigmas.map { Double(Foundation.log($0)) }
        // The table rises: the last entry that is not above the wanted level.
        let below = logs.prefix { $0 <= wanted }.count - 1
        let low = min(max(below, 0), table.count - 2)
        let weight = min(max((logs[low] - wanted) / (logs[low] - logs[low + 1]), 0), 1)
        return (1 - weight) * Double(low) + weight * Double(low + 1)
    }
}
