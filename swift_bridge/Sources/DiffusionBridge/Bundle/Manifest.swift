import Foundation

/// manifest.json beside converted models: what cannot be read from the models' interfaces. Names as in Python.
struct Manifest: Sendable {
    static let fileName = "manifest.json"
    private static let newestFormat = 1

    struct Component: Sendable {
        /// The models in the order in which they run: two for a chunked UNet.
        let files: [String]
        let inputs: [TensorSpec]
        let units: ComputeUnits
        let sizeBytes: Int
        /// How many tokens a text encoder knows, as far as that is known.
        var vocabularySize: Int?
    }

    struct Latents: Sendable {
        let channels: Int
        /// How much larger pictures are.
        let factor: Int
        let scale: Float
        let shift: Float
    }

    /// What is told of the component "refiner" beside a Stable Diffusion XL base.
    struct Refiner: Sendable {
        let scheduler: [String: JSON]
        let prediction: String
        var zerosForEmptyPrompt = false
    }

    let name: String
    var revision: String?
    var family: String
    let attention: String
    let latents: Latents
    var prediction: String
    var components: [String: Component]
    var scheduler: [String: JSON]
    var noiseScheduler: [String: JSON]?
    /// The folder of vocab.json and merges.txt.
    var tokenizer: String?
    /// The same of a second text encoder.
    var secondTokenizer: String?
    /// A negative prompt that is not given has states of zeros.
    var zerosForEmptyPrompt = false
    var refiner: Refiner?
    let wantsSafetyChecker: Bool
}

extension Manifest {

    /// The manifest of a folder. Throws where it is missing, damaged or of the future.
    init(contentsOf folder: URL) throws {
        let file = folder.appending(Self.fileName)
        let reader = ManifestReader(json: try JSON(contentsOf: file), file: file.path)
        let format = try reader.integer("format_version", 1)
        guard format <= Self.newestFormat else {
            throw DiffusionError.package(
                "\(file.path): manifest format \(format) is newer than this version reads (\(Self.newestFormat)): "
                    + "update the package")
        }
        if let layout = reader.json["layout"]?.string, layout != "apple" {
            throw DiffusionError.input(
                "\(folder.path): was converted with --layout \(layout), for other programs; convert without it")
        }
        let source = try reader.object("source")
        name = try source.string("name")
        revision = source.json["revision"]?.string
        family = try reader.string("family")
        attention = try reader.string("attention")
        let latents = try reader.object("latents")
        self.latents = Latents(
            channels: try latents.integer("channels", nil), factor: try latents.integer("factor", nil),
            scale: Float(try latents.number("scale", nil)), shift: Float(try latents.number("shift", 0)))
        prediction = try reader.string("prediction_type")
        components = try reader.members("components").mapValues { try $0.component() }
        scheduler = try reader.object("scheduler").json.object ?? [:]
        noiseScheduler = reader.json["noise_scheduler"]?.object
        tokenizer = reader.json["tokenizer"].map { $0.string } ?? "."
        secondTokenizer = reader.json["tokenizer_2"]?.string
        zerosForEmptyPrompt = reader.json["force_zeros_for_empty_prompt"]?.bool ?? false
        if reader.json["refiner"]?.isNull == false {
            let refiner = try reader.object("refiner")
            self.refiner = Refiner(
                scheduler: try refiner.object("scheduler").json.object ?? [:],
                prediction: try refiner.string("prediction_type"),
                zerosForEmptyPrompt: refiner.json["force_zeros_for_empty_prompt"]?.bool ?? false)
        }
        wantsSafetyChecker = reader.json["requires_safety_checker"]?.bool ?? false
    }

    /// The manifest of the refiner beside a base, as if it was alone there, its UNet the component "refiner" still; nil
    /// where there is none.
    func ofRefiner() -> Manifest? {
        guard let refiner, components.keys.contains("refiner") else { return nil }
        var own = self
        own.family = "sdxl-refiner"
        (own.scheduler, own.prediction) = (refiner.scheduler, refiner.prediction)
        own.zerosForEmptyPrompt = refiner.zerosForEmptyPrompt
        own.components = components.filter { !["unet", "text_encoder"].contains($0.key) }
        own.refiner = nil
        return own
    }

    /// The checkpoint's scheduler with the settings that its family's pipeline in diffusers imposes, in place of what the
    /// file says or leaves out.
    var schedulerConfiguration: SchedulerConfiguration {
        SchedulerConfiguration(scheduler).imposing(Family.named(family).schedulerSettings)
            .setting(["prediction_type": .string(prediction)])
    }
}

/// Reads members of a JSON object, and names the one that is damaged.
private struct ManifestReader {
    let json: JSON
    let file: String
    var path = ""

    func damage(_ key: String, _ expected: String) -> DiffusionError {
        DiffusionError.package("\(file): not a valid manifest: \(path)\(key): expected \(expected)")
    }

    func string(_ key: String) throws -> String {
        guard let value = json[key]?.string else { throw damage(key, "a text") }
        return value
    }

    func number(_ key: String, _ fallback: Double?) throws -> Double {
        guard let value = json[key] ?? fallback.map(JSON.number), let number = value.number else {
            throw damage(key, "a number")
        }
        return number
    }

    func integer(_ key: String, _ fallback: Int?) throws -> Int {
        guard let value = json[key]?.integer ?? (json[key] == nil ? fallback : nil), (0..<1 << 31).contains(value)
        else { throw damage(key, "a whole number") }
        return value
    }

    func object(_ key: String) throws -> ManifestReader {
        guard let value = json[key], value.object != nil else { throw damage(key, "an object") }
        return ManifestReader(json: value, file: file, path: "\(path)\(key).")
    }

    func members(_ key: String) throws -> [String: ManifestReader] {
        let reader = try object(key)
        var members: [String: ManifestReader] = [:]
        for name in reader.json.object?.keys ?? [:].keys { members[name] = try reader.object(name) }
        return members
    }

    func component() throws -> Manifest.Component {
        let files = json["files"]?.array?.compactMap(\.string) ?? []
        guard !files.isEmpty, files.allSatisfy({ !$0.hasPrefix("/") && !$0.split(separator: "/").contains("..") })
        else { throw damage("files", "names of files in the folder") }
        let inputs = try (json["inputs"]?.array ?? []).map { entry in
            let shape = entry["shape"]?.array?.compactMap(\.integer) ?? []
            guard let name = entry["name"]?.string, shape.allSatisfy({ $0 > 0 }) else {
                throw damage("inputs", "a name and a shape")
            }
            return TensorSpec(name: name, shape: shape)
        }
        return Manifest.Component(
            files: files, inputs: inputs,
            units: try ComputeUnits(named: json["compute_units"]?.string ?? "all"),
            sizeBytes: try integer("size_bytes", 0), vocabularySize: json["vocabulary_size"]?.integer)
    }
}
