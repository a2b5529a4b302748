/// diffusers' scheduler_config.json, with a scheduler's own defaults. What this package does not know how to follow is
/// refused: a picture that is silently wrong helps nobody.
struct SchedulerConfiguration: Sendable {
    private let values: [String: JSON]
    /// The class of diffusers whose configuration this is.
    let className: String

    init(_ values: [String: JSON]) {
        self.values = values
        className = values["_class_name"]?.string ?? "PNDMScheduler"
    }

    /// The same with some values replaced.
    func setting(_ changed: [String: JSON]) -> SchedulerConfiguration {
        SchedulerConfiguration(values.merging(changed) { $1 })
    }

    /// The same with settings that a pipeline imposes. As in diffusers, true and false give way to their opposite alone,
    /// and null is neither.
    func imposing(_ settings: [String: JSON]) -> SchedulerConfiguration {
        setting(settings.filter { key, value in values[key] == nil || value.bool == nil || values[key]?.bool != nil })
    }

    func bool(_ key: String, _ fallback: Bool) throws -> Bool {
        guard let value = given(key) else { return fallback }
        guard let bool = value.bool else { throw damage(key, value, "true or false") }
        return bool
    }

    func integer(_ key: String, _ fallback: Int) throws -> Int {
        guard let value = given(key) else { return fallback }
        if let whole = value.integer { return whole }
        guard let number = value.number, let whole = Int(exactly: number) else {
            throw damage(key, value, "a whole number")
        }
        return whole
    }

    func number(_ key: String, _ fallback: Double) throws -> Double {
        guard let value = given(key) else { return fallback }
        guard let number = value.number else { throw damage(key, value, "a number") }
        return number
    }

    /// How far clean latents may be from 0, nil: as far as they are.
    func clip(byDefault fallback: Bool) throws -> Float? {
        try bool("clip_sample", fallback) ? Float(number("clip_sample_range", 1)) : nil
    }

    func optionalNumber(_ key: String) throws -> Double? {
        given(key) == nil ? nil : try number(key, 0)
    }

    func numbers(_ key: String) throws -> [Double]? {
        guard let value = given(key) else { return nil }
        let numbers = value.array?.compactMap(\.number) ?? []
        guard let array = value.array, numbers.count == array.count, !array.isEmpty else {
            throw damage(key, value, "a list of numbers")
        }
        return numbers
    }

    /// One of some words.
    func choice<Choice: RawRepresentable & CaseIterable>(_ key: String, _ fallback: Choice) throws -> Choice
    where Choice.RawValue == String {
        guard let value = given(key) else { return fallback }
        guard let word = value.string, let choice = Choice(rawValue: word) else {
            throw damage(key, value, Choice.allCases.map(\.rawValue).joined(separator: ", "))
        }
        return choice
    }

    /// Throw where a setting asks for something that is not made here.
    func refuse(_ key: String, unless accepted: Set<String>) throws {
        guard let value = given(key), !accepted.contains(value.string ?? value.text) else { return }
        throw DiffusionError.input(
            "scheduler \(className): \(key) is \(value.text), which the Swift program does not do "
                + "(it does \(accepted.sorted().joined(separator: ", "))): choose another with --scheduler")
    }

    func isEmptyList(_ key: String) -> Bool {
        given(key)?.array?.isEmpty == true
    }

    /// A value as it stands in the file, nil where it is not there.
    subscript(key: String) -> JSON? { given(key) }

    private func given(_ key: String) -> JSON? {
        guard let value = values[key], !value.isNull else { return nil }
        return value
    }

    private func damage(_ key: String, _ value: JSON, _ expected: String) -> DiffusionError {
        DiffusionError.package("scheduler \(className): \(key) is \(value.text), expected \(expected)")
    }
}

/// What the UNet predicts.
enum PredictionType: String, Sendable, CaseIterable {
    case epsilon
    case sample
    case velocity = "v_prediction"
}

/// How timesteps are spread over those of the training.
enum TimestepSpacing: String, Sendable, CaseIterable {
    case linspace, leading, trailing
}

enum BetaSchedule: String, Sendable, CaseIterable {
    case linear
    case scaledLinear = "scaled_linear"
    case cosine = "squaredcos_cap_v2"
}

enum FinalSigmas: String, Sendable, CaseIterable {
    case zero
    case minimum = "sigma_min"
}
