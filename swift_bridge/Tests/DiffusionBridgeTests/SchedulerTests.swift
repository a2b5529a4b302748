import Foundation
import Testing

@testable import DiffusionBridge

/// One run of a scheduler in diffusers: timesteps, first latents, three values of the latents and one of the preview
/// after each step, last latents.
private struct SchedulerCase {
    static let shape = [1, 4, 2, 2]
    let name: String?
    let found: String
    let configuration: SchedulerConfiguration
    let steps: Int
    let eta: Double
    let strength: Double?
    let count: Int
    let values: [Float]

    init(_ json: JSON) throws {
        name = json["name"]?.string
        found = try #require(json["found"]?.string)
        configuration = SchedulerConfiguration(try #require(json["config"]?.object))
        steps = try #require(json["steps"]?.integer)
        eta = try #require(json["eta"]?.number)
        strength = json["strength"]?.number
        count = try #require(json["count"]?.integer)
        let text = try #require(json["values"]?.string)
        values = floats(try #require(Data(base64Encoded: text)))
    }

    var label: String {
        let settings = ["prediction_type", "timestep_spacing"].map { configuration[$0]?.text ?? "default" }
        return "\(name ?? "its own"), \(steps) steps, \(settings)"
    }

    func slice(_ start: Int, _ count: Int) -> ArraySlice<Float> { values[start..<start + count] }
}

/// The largest difference, relative to the largest value where that is above 1.
private func difference(_ got: some Sequence<Float>, _ expected: some Sequence<Float>) -> Float {
    let scale = max(1, expected.map { abs($0) }.max() ?? 1)
    return (zip(got, expected).map { $0.isFinite ? abs($0 - $1) : .infinity }.max() ?? .infinity) / scale
}

private func run(_ expected: SchedulerCase) throws -> Float {
    let kind = try expected.name.map(SchedulerKind.init(named:))
    let configuration = kind?.applied(to: expected.configuration) ?? expected.configuration
    #expect(SchedulerKind.named(configuration)?.rawValue == expected.found)
    var scheduler = try configuration.scheduler(steps: expected.steps, eta: expected.eta)
    var noise = Noise(seeds: [7], source: .torch)
    let drawn = try noise.normal(SchedulerCase.shape)
    var first = 0
    var latents = drawn.mapped { $0 * scheduler.initialNoise }
    if let strength = expected.strength {
        first = try scheduler.firstCall(steps: expected.steps, strength: strength)
        scheduler.position = first
        latents = scheduler.noised(Tensor(repeating: 0.5, shape: SchedulerCase.shape), drawn, at: first)
    }
    let timesteps = scheduler.timesteps[first...].map(Float.init)
    var worst = difference(timesteps, expected.slice(0, expected.count))
    #expect(timesteps.count == expected.count)
    worst = max(worst, difference(latents.values, expected.slice(expected.count, 16)))
    var place = expected.count + 16
    for timestep in scheduler.timesteps[first...] {
        let input = scheduler.scaled(latents)
        let addend = Float(timestep) * 0.0005
        let output = input.mapped { $0 * 0.5 + addend }
        let preview = estimated(
            input, output, timestep, table: scheduler.table, prediction: scheduler.prediction)
        latents = try scheduler.step(output, latents) { try noise.normal($0.shape) }
        worst = max(worst, difference(latents.values.prefix(3) + preview.values.prefix(1), expected.slice(place, 4)))
        place += 4
    }
    return max(worst, difference(latents.values, expected.slice(place, 16)))
}

@Test func schedulersFollowDiffusersToOneInAHundredThousand() throws {
    let url = try #require(Bundle.module.url(forResource: "schedulers", withExtension: "json", subdirectory: "Golden"))
    let listed = try JSON(contentsOf: url).array ?? []
    let cases = try listed.map(SchedulerCase.init)
    #expect(cases.count > 400)
    var worst: Float = 0
    for expected in cases {
        let found = try run(expected)
        worst = max(worst, found)
        #expect(found <= 1e-5, "\(expected.label)")
    }
    print("schedulers: \(cases.count) runs, worst difference \(worst)")
}
