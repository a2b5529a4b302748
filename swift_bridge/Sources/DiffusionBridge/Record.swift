import Foundation

/// How a picture was made, as a PNG file says it beside the pixels: the Python command writes and reads the same.
public struct Record: Sendable {
    static let key = "coreml-sd"
    private static let oldKey = "coreml-diffusion"
    private var members: [(name: String, value: JSON)]

    init(_ members: [(name: String, value: JSON)]) {
        self.members = members
    }

    /// What a PNG file says of its making. Throws where it says nothing, or is damaged.
    public init(contentsOf picture: URL) throws {
        let data: Data
        do {
            data = try Data(contentsOf: picture)
        } catch {
            throw DiffusionError.input("picture \(picture.path): cannot be read: \(reason(error))")
        }
        do {
            let texts = try PNG.texts(Array(data))
            guard let text = texts[Self.key] ?? texts[Self.oldKey] else {
                throw DiffusionError.input("it does not say how it was made (no '\(Self.key)' entry in the PNG)")
            }
            guard let object = try JSON(parsing: Array(text.utf8)).object else {
                throw DiffusionError.input("its record is no JSON object")
            }
            members = object.sorted { $0.key < $1.key }.map { ($0.key, $0.value) }
        } catch let error as DiffusionError {
            throw DiffusionError.input("picture \(picture.path): \(error.message)")
        }
    }

    subscript(name: String) -> JSON? {
        members.first { $0.name == name }.flatMap { $0.value.isNull ? nil : $0.value }
    }

    /// A text in the record, as "models", "image" or "image_sha256"; nil where there is none.
    public func text(_ name: String) -> String? { self[name]?.string }
    /// A number in the record, as "latent_scale"; nil where there is none.
    public func number(_ name: String) -> Double? { self[name]?.number }

    /// The same with a text added or replaced.
    public func adding(_ name: String, _ text: String) -> Record { adding(name, JSON.string(text)) }
    /// The same with a number added or replaced.
    public func adding(_ name: String, _ number: Double) -> Record { adding(name, JSON.number(number)) }
    /// The same with a yes or no added or replaced.
    public func adding(_ name: String, _ isSo: Bool) -> Record { adding(name, JSON.bool(isSo)) }

    private func adding(_ name: String, _ value: JSON) -> Record {
        Record(members.filter { $0.name != name } + [(name, value)])
    }

    /// The request that makes the picture again, without the pictures that it started from. Throws where the record is
    /// damaged.
    public func request() throws -> Request {
        guard let prompt = text("prompt") else { throw DiffusionError.input("its record lacks the prompt") }
        let seed: UInt64? =
            switch self["seed"] {
            case .integer(let whole) where whole >= 0: UInt64(whole)
            case .unsigned(let whole): whole
            case nil: 0
            default: nil
            }
        guard let seed else { throw damage("seed") }
        var request = Request(prompt: prompt, negativePrompt: try value("negative_prompt") { $0.string }, seed: seed)
        request.randomSource = try value("rng") { $0.string.flatMap { RandomSource(rawValue: $0) } } ?? .torch
        request.scheduler = try value("scheduler") { $0.string }.map { try SchedulerKind(named: $0) }
        request.numInferenceSteps = try value("steps") { $0.integer }
        request.guidanceScale = try value("guidance_scale") { $0.number }
        request.eta = try value("eta") { $0.number } ?? request.eta
        request.strength = try value("strength") { $0.number }
        request.noiseLevel = try value("noise_level") { $0.integer }
        request.longPrompt = try value("long_prompt") { $0.bool } ?? false
        request.refinerStart = try value("refiner_start") { $0.number }
        if self["height"] != nil || self["width"] != nil {
            throw DiffusionError.input("it was made with models of several sizes, of which this package draws the first: repeat it with the Python command")
        }
        if let controls = self["controls"], controls != .array([]) {
            throw DiffusionError.input("it was steered by ControlNets, which this package cannot: repeat it with the Python command")
        }
        if let adapters = self["adapters"], adapters != .array([]) {
            throw DiffusionError.input("it was steered by T2I-Adapters, which this package cannot: repeat it with the Python command")
        }
        if let pictures = self["ip_adapter_images"], pictures != .array([]) {
            throw DiffusionError.input("it was drawn after pictures, which this package cannot: repeat it with the Python command")
        }
        return request
    }

    private func value<Value>(_ name: String, _ convert: (JSON) -> Value?) throws -> Value? {
        guard let found = self[name] else { return nil }
        guard let value = convert(found) else { throw damage(name) }
        return value
    }

    private func damage(_ name: String) -> DiffusionError {
        .input("its record is damaged at \(name): \(self[name]?.text ?? "nothing")")
    }

    var json: String { JSON.text(of: members.map { ($0.name, $0.value) }) }
}

extension Pipeline {
    /// Facts about the models, one line each.
    public var description: [String] {
        let parts = manifest.components.sorted { $0.key < $1.key }.map { name, component in
            "  \(name): \(component.files.joined(separator: " + ")), \(component.sizeBytes / 1_000_000) MB"
        }
        return [
            "\(manifest.name): \(manifest.family), \(width)x\(height), batch \(sample[0]), attention \(manifest.attention)",
            "\(manifest.prediction) prediction, latent scale \(manifest.latents.scale), "
                + "scheduler \(manifest.schedulerConfiguration.className)",
        ] + parts
    }

    /// How the first picture of a request was made, as the Python command records it: `generate --from` of either
    /// program repeats the picture. Throws for what these models cannot do.
    public func record(of request: Request) throws -> Record {
        let purpose = try Purpose(channels: sample[1], request)
        let used = request.scheduler?.applied(to: manifest.schedulerConfiguration) ?? manifest.schedulerConfiguration
        let scheduler = SchedulerKind.named(used)?.rawValue ?? used.className
        let settled = settled(request)
        let strength = purpose.takes.contains(.strength) ? settled.strength : nil
        let noise = purpose.takes.contains(.noiseLevel) ? request.noiseLevel ?? Job.usualNoise : nil
        let seed = request.seeds.first ?? 0
        return Record([
            ("prompt", .string(request.prompts.first ?? "")),
            ("negative_prompt", request.negativePrompts.first.map(JSON.string) ?? .null),
            ("seed", Int(exactly: seed).map(JSON.integer) ?? .unsigned(seed)),
            ("rng", .string(request.randomSource.rawValue)),
            ("scheduler", .string(scheduler)),
            ("steps", settled.numInferenceSteps.map(JSON.integer) ?? .null),
            ("guidance_scale", settled.guidanceScale.map(JSON.number) ?? .null),
            ("eta", .number(request.eta)),
            ("strength", strength.map(JSON.number) ?? .null),
            ("noise_level", noise.map(JSON.integer) ?? .null),
            ("long_prompt", .bool(request.longPrompt)),
            ("refiner_start", request.refinerStart.map(JSON.number) ?? .null),
            ("height", .null),
            ("width", .null),
            ("controls", .array([])),
            ("adapters", .array([])),
            ("ip_adapter_images", .array([])),
            ("task", .string(purpose.rawValue)),
            ("model", .string(manifest.name)),
            ("revision", manifest.revision.map(JSON.string) ?? .null),
            ("family", .string(manifest.family)),
            ("attention", .string(manifest.attention)),
            ("safety_checker", .bool(checksSafety)),
        ])
    }
}

extension Picture {
    /// The bytes of a PNG file, with a record of the picture's making beside the pixels.
    public func png(record: Record? = nil) -> Data {
        let texts = record.map { [(Record.key, $0.json), ("Software", "coreml-sd")] } ?? []
        return Data(PNG.encoded(self, texts: texts))
    }

    /// Write a PNG file, which is there whole or not at all.
    public func write(to file: URL, record: Record? = nil) throws {
        do {
            let folder = file.deletingLastPathComponent()
            try FileManager.default.createDirectory(at: folder, withIntermediateDirectories: true)
            try png(record: record).write(to: file, options: .atomic)
        } catch {
            throw DiffusionError.storage("\(file.path): cannot be written: \(reason(error))")
        }
    }
}
