import Foundation

/// UniPC (Zhao et al., 2023): a predictor whose result the next call of the UNet corrects, for clean latents.
struct UniPC: SolverScheduler {
    private enum Kind: String, CaseIterable {
        case bh1, bh2
        // The names that other solvers' configurations have; diffusers takes them for bh2.
        case midpoint, heun, logrho
    }

    let table: NoiseTable
    let prediction: PredictionType
    let timesteps: [Double]
    let levels: [Float]
    var position = 0
    private let kind: Kind
    private let solverOrder: Int
    private let endsLower: Bool
    private let uncorrected: Set<Int>
    /// Clean latents of the calls before, the last one first.
    private var pictures: [Tensor] = []
    private var lastSample: Tensor?
    private var lastOrder = 1

    init(_ configuration: SchedulerConfiguration, steps: Int) throws {
        try configuration.refuseUnknownSpacings()
        try configuration.refuse("predict_x0", unless: ["true"])
        try configuration.refuse("solver_order", unless: ["1", "2", "3"])
        prediction = try configuration.choice("prediction_type", .epsilon)
        kind = try configuration.choice("solver_type", .bh2)
        solverOrder = try configuration.integer("solver_order", 2)
        endsLower = try configuration.bool("lower_order_final", true)
        uncorrected = Set(try configuration.optionalNumbers("disable_corrector").map { Int($0) })
        table = try NoiseTable(configuration, readsZeroSNR: true, keepsLastFinite: true)
        let spacing = try SolverSpacing(
            configuration, table, steps: steps,
            timesteps: Spacing.multistepTimesteps(
                try configuration.choice("timestep_spacing", .linspace), steps, table,
                offset: try configuration.integer("steps_offset", 0), last: table.count),
            endsAtOwnMinimum: true)
        (timesteps, levels) = (spacing.timesteps, spacing.levels)
    }

    mutating func step(_ output: Tensor, _ sample: Tensor, draw: (Tensor) throws -> Tensor) throws -> Tensor {
        let picture = clean(sample, output)
        var corrected = sample
        if let lastSample, position > 0, !uncorrected.contains(position - 1) {
            corrected = update(lastSample, from: position - 1, order: lastOrder, correctedBy: picture)
        }
        pictures = [picture] + pictures.prefix(solverOrder - 1)
        let room = endsLower ? min(solverOrder, timesteps.count - position) : solverOrder
        lastOrder = min(room, pictures.count)
        lastSample = corrected
        defer { position += 1 }
        return update(corrected, from: position, order: lastOrder, correctedBy: nil)
    }

    /// From the latents at step `from` to those of the next: equation 3 of the paper; with the picture found there,
    /// the corrector's.
    private func update(_ sample: Tensor, from step: Int, order: Int, correctedBy picture: Tensor?) -> Tensor {
        let (start, end) = (Level(levels[step]), Level(levels[step + 1]))
        let h = end.lambda - start.lambda
        let growth = expm1(-h)
        let scale = kind == .bh1 ? -h : growth
        var ratios: [Float] = []
        for back in 1..<max(order, 1) {
            ratios.append((Level(levels[step - back]).lambda - start.lambda) / h)
        }
        let weights = Self.weights(ratios + [1], h: h, scale: scale, isCorrector: picture != nil)
        var terms: [(Float, Tensor)] = [(end.sigma / start.sigma, sample)]
        var ownFactor = -end.alpha * growth
        for (index, ratio) in ratios.enumerated() {
            let factor = -end.alpha * scale * weights[index] / ratio
            terms.append((factor, pictures[index + 1]))
            ownFactor -= factor
        }
        if let picture, let weight = weights.last {
            let factor = -end.alpha * scale * weight
            terms.append((factor, picture))
            ownFactor -= factor
        }
        terms.append((ownFactor, pictures[0]))
        return Tensor.combination(terms)
    }

    /// How much each difference of pictures counts. The predictor has no use for the last, which belongs to the
    /// picture that is not known yet.
    private static func weights(_ ratios: [Float], h: Float, scale: Float, isCorrector: Bool) -> [Float] {
        let count = isCorrector ? ratios.count : ratios.count - 1
        if count == 0 { return [] }
        // Zhao et al. set the lowest orders to one half; the solution of the equations is close to it.
        if count == 1 { return [0.5] }
        var right: [Float] = []
        var factorial: Float = 1
        var phi = expm1(-h) / -h - 1
        for power in 1...count {
            right.append(phi * factorial / scale)
            factorial *= Float(power + 1)
            phi = phi / -h - 1 / factorial
        }
        let rows = (0..<count).map { power in ratios.prefix(count).map { pow($0, Float(power)) } }
        return solved(rows, right)
    }

    /// The solution of linear equations, by elimination with pivots.
    private static func solved(_ rows: [[Float]], _ right: [Float]) -> [Float] {
        var matrix = rows.enumerated().map { $0.element + [right[$0.offset]] }
        let count = right.count
        for column in 0..<count {
            let pivot = (column..<count).max { abs(matrix[$0][column]) < abs(matrix[$1][column]) } ?? column
            matrix.swapAt(column, pivot)
            for row in 0..<count where row != column {
                let factor = matrix[row][column] / matrix[column][column]
                for index in column...count { matrix[row][index] -= factor * matrix[column][index] }
            }
        }
        return (0..<count).map { matrix[$0][count] / matrix[$0][$0] }
    }
}

extension SchedulerConfiguration {
    /// A list of numbers, empty where there is none.
    func optionalNumbers(_ key: String) throws -> [Double] {
        if isEmptyList(key) { return [] }
        return try numbers(key) ?? []
    }
}
