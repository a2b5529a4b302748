/// Linear multistep with coefficients that fit the noise levels (Adams and Bashforth), as Crowson's k-diffusion has it.
struct LMS: SigmaScheduler {
    private static let mostDerivatives = 4
    let table: NoiseTable
    let prediction: PredictionType
    let spacing: SigmaSpacing
    var position = 0
    private var derivatives: [Tensor] = []

    init(_ configuration: SchedulerConfiguration, steps: Int) throws {
        try configuration.refuseUnknownSpacings()
        prediction = try configuration.choice("prediction_type", .epsilon)
        table = try NoiseTable(configuration)
        let plain = configuration.setting(["final_sigmas_type": .null, "sigma_min": .null, "sigma_max": .null])
        spacing = try SigmaSpacing(plain, table, steps: steps, allowsKarras: true)
    }

    mutating func step(_ output: Tensor, _ sample: Tensor, draw: (Tensor) throws -> Tensor) throws -> Tensor {
        derivatives = [derivative(sample, output, spacing.sigmas[position])] + derivatives
        derivatives = Array(derivatives.prefix(Self.mostDerivatives))
        // When a picture is changed, fewer derivatives are there than the position has room for: diffusers then
        // uses the coefficients of the full number with those that it has.
        let count = min(position + 1, Self.mostDerivatives)
        let coefficients = (0..<count).map { Float(coefficient(of: $0, among: count)) }
        position += 1
        return Tensor.combination([(1, sample)] + Array(zip(coefficients, derivatives)))
    }

    /// The integral, from this noise level to the next, of the Lagrange polynomial that is 1 at the level `index` steps
    /// ago and 0 at the others. Of degree 3 at most, so that Gauss's two points give it exactly.
    private func coefficient(of index: Int, among count: Int) -> Double {
        let level = { (back: Int) in Double(spacing.sigmas[position - back]) }
        let (start, end) = (level(0), Double(spacing.sigmas[position + 1]))
        let (middle, half) = ((start + end) / 2, (end - start) / 2)
        let polynomial = { (place: Double) in
            (0..<count).filter { $0 != index }.reduce(1.0) {
                $0 * (place - level($1)) / (level(index) - level($1))
            }
        }
        let distance = half / 3.0.squareRoot()
        return half * (polynomial(middle - distance) + polynomial(middle + distance))
    }
}
