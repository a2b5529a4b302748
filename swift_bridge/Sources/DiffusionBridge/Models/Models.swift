import Foundation

/// Seconds spent in one model. The first call often holds what the system puts off until then.
public struct Timing: Sendable, Equatable {
    /// Loading, each time that it was done.
    public var loadSeconds = 0.0
    /// The first call.
    public var firstCallSeconds = 0.0
    /// How many calls there were.
    public var calls = 0
    fileprivate var laterSeconds = 0.0

    /// Mean of all calls but the first; the first's where there is no other.
    public var steadySeconds: Double { calls > 1 ? laterSeconds / Double(calls - 1) : firstCallSeconds }
}

/// The models of one pipeline: loaded when first asked for, timed, freed when told.
actor Models {
    typealias Load = @Sendable () async throws -> any Model
    private let loads: [String: Load]
    private let keeps: Bool
    private var loaded: [String: Task<any Model, any Error>] = [:]
    private(set) var timings: [String: Timing] = [:]

    /// With `keeps` false a model is freed as soon as its stage is over, and loaded anew when needed.
    init(_ loads: [String: Load], keeps: Bool) {
        self.loads = loads
        self.keeps = keeps
    }

    nonisolated func has(_ name: String) -> Bool { loads[name] != nil }

    func isLoaded(_ name: String) -> Bool { loaded[name] != nil }

    /// The model, loaded now if it was not.
    func model(_ name: String) async throws -> NamedModel {
        guard let load = loads[name] else {
            let known = loads.keys.sorted().joined(separator: ", ")
            throw DiffusionError.input("these models have no \(name) (they have: \(known)): convert again with it")
        }
        if let task = loaded[name] { return NamedModel(name: name, model: try await task.value, owner: self) }
        let clock = ContinuousClock()
        let start = clock.now
        let task = Task { try await load() }
        loaded[name] = task
        do {
            let model = try await task.value
            timings[name, default: Timing()].loadSeconds += (clock.now - start).seconds
            return NamedModel(name: name, model: model, owner: self)
        } catch {
            loaded[name] = nil
            throw error
        }
    }

    /// Say that a stage is over: frees these models unless they are kept.
    func release(_ names: [String]) {
        guard !keeps else { return }
        for name in names { loaded[name] = nil }
    }

    func release(_ name: String) {
        release([name])
    }

    fileprivate func add(_ seconds: Double, to name: String) {
        var timing = timings[name, default: Timing()]
        if timing.calls == 0 { timing.firstCallSeconds = seconds } else { timing.laterSeconds += seconds }
        timing.calls += 1
        timings[name] = timing
    }
}

/// A model that knows its name and says how long it takes.
struct NamedModel: Sendable {
    let name: String
    let model: any Model
    fileprivate let owner: Models

    var inputs: [String: TensorSpec] { model.inputs }

    func predict(_ tensors: [String: Tensor]) async throws -> [String: Tensor] {
        let clock = ContinuousClock()
        let start = clock.now
        let results = try await model.predict(tensors)
        await owner.add((clock.now - start).seconds, to: name)
        return results
    }

    /// The output of a name, or the only one. Throws where it is not made of numbers.
    func one(_ output: String, _ tensors: [String: Tensor]) async throws -> Tensor {
        try checked(output, try await predict(tensors))
    }

    /// Of a call's results, the one of a name, or the only one. Throws where it is not made of numbers.
    func checked(_ output: String, _ results: [String: Tensor]) throws -> Tensor {
        guard let value = results[output] ?? (results.count == 1 ? results.values.first : nil) else {
            let known = results.keys.sorted().joined(separator: ", ")
            throw DiffusionError.package("\(name): has no output \(output) (it has: \(known))")
        }
        guard value.isFinite else { throw DiffusionError.notFinite(name) }
        return value
    }
}

extension Duration {
    var seconds: Double { Double(components.seconds) + Double(components.attoseconds) * 1e-18 }
}
