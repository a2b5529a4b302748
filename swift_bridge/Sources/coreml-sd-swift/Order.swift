import DiffusionBridge
import Foundation

/// What a command line asks for: the pictures to draw, the models to draw them with, and the files to start from. What
/// the options do not say, the record of the picture of `--from` says, else defaults.
struct Order {
    static let options: Set<String> = [
        "--prompt", "--prompts-file", "--output", "--negative-prompt", "--steps", "--guidance-scale", "--seed", "--rng",
        "--scheduler", "--eta", "--count", "--image", "--strength", "--mask", "--depth-image", "--noise-level",
        "--refiner-start", "--from", "--compute-units", "--tokenizer", "--prediction-type", "--latent-scale",
        "--memory-budget",
    ]
    static let flags: Set<String> = ["--long-prompt", "--reduce-memory", "--no-safety", "--timings", "--preview", "--prewarm"]
    let models: URL
    let output: URL
    let requests: [Request]
    let configuration: Pipeline.Configuration
    let arguments: Arguments
    private let files: [String: URL]

    /// Throws for what is missing, contradictory or cannot be used, before any model is loaded.
    init(_ words: [String]) throws {
        arguments = try Arguments(words, options: Self.options, flags: Self.flags)
        guard arguments.positional.count <= 1 else {
            throw DiffusionError(.input, "expected one folder of models: generate MODELS --prompt … -o FILE.png")
        }
        let past = try arguments.path("--from").map(Past.init)
        let folder = arguments.positional.first.map { URL(fileURLWithPath: $0) }
        let isKnown = past?.record.text("models").map { URL(fileURLWithPath: $0).lastPathComponent }
        models = try Self.models(folder, past)
        // How a picture's models were loaded counts for models of their name alone.
        let loading = folder == nil || folder?.lastPathComponent == isKnown ? past : nil
        configuration = try Self.configuration(arguments, loading)
        output = try Self.output(arguments, past)
        files = try Self.files(arguments, past)
        requests = try Self.requests(arguments, past, files)
        for request in requests { try request.check() }
        for file in requests.indices.map(file) { try Self.checkWritable(file) }
    }

    /// Where the picture of a number goes.
    func file(_ index: Int) -> URL {
        guard requests.count > 1 else { return output }
        return beside("\(index + 1)")
    }

    /// The output's name with a word added, said as the output was.
    private func beside(_ word: String) -> URL {
        URL(fileURLWithPath: "\(output.relativePath.dropLast(output.pathExtension.count + 1))-\(word).png")
    }

    /// Where previews go; nil without them.
    func preview() throws -> URL? {
        guard arguments.flags.contains("--preview") else { return nil }
        let file = beside("preview")
        guard !FileManager.default.fileExists(atPath: file.path) else {
            throw DiffusionError(
                .input, "\(file.path): is there already, and --preview would overwrite it: move it, or leave --preview out")
        }
        return file
    }

    /// A record with what the command alone knows: the folder of models, and the files that went into the picture.
    func completed(_ record: Record, _ picture: URL) throws -> Record {
        var record = record.adding("models", Past.named(models, by: picture))
        for (name, file) in files.sorted(by: { $0.key < $1.key }) {
            record = record.adding(name, Past.named(file, by: picture)).adding("\(name)_sha256", try sha256(file))
        }
        if let tokenizer = configuration.tokenizer {
            record = record.adding("tokenizer", Past.named(tokenizer, by: picture))
        }
        if let prediction = configuration.predictionType { record = record.adding("prediction_type", prediction) }
        if let scale = configuration.latentScale { record = record.adding("latent_scale", scale) }
        return record
    }

    private static func models(_ folder: URL?, _ past: Past?) throws -> URL {
        if let folder { return folder }
        guard let past, let name = past.record.text("models") else {
            throw DiffusionError(.input, "no models named: generate MODELS --prompt … -o FILE.png")
        }
        return try past.find(name, "name the models, generate MODELS --from \(past.picture.relativePath)")[0]
    }

    private static func configuration(_ arguments: Arguments, _ past: Past?) throws -> Pipeline.Configuration {
        var configuration = Pipeline.Configuration()
        configuration.computeUnits = try arguments.text("--compute-units").map(ComputeUnits.init(named:))
        configuration.reduceMemory = arguments.flags.contains("--reduce-memory")
        configuration.memoryBudget = try arguments.number("--memory-budget", "a number of bytes")
        configuration.checkSafety = !arguments.flags.contains("--no-safety")
        configuration.tokenizer = try arguments.path("--tokenizer")
            ?? past?.record.text("tokenizer").flatMap { try past?.find($0, "name it with --tokenizer")[0] }
        configuration.predictionType = arguments.text("--prediction-type") ?? past?.record.text("prediction_type")
        configuration.latentScale = try arguments.number("--latent-scale", "a number") ?? past?.record.number("latent_scale")
        return configuration
    }

    private static func output(_ arguments: Arguments, _ past: Past?) throws -> URL {
        guard let output = arguments.path("--output") else {
            guard let picture = past?.picture else { throw DiffusionError(.input, "no output named: give -o FILE.png") }
            let stem = picture.deletingPathExtension().lastPathComponent
            return picture.deletingLastPathComponent().appendingPathComponent("\(stem)-again.png")
        }
        guard output.pathExtension.lowercased() == "png" else {
            throw DiffusionError(.input, "\(output.path): expected a name that ends in .png")
        }
        return output
    }

    /// What a file cannot be written over or into is said before the work is done.
    private static func checkWritable(_ file: URL) throws {
        let files = FileManager.default
        var isFolder: ObjCBool = false
        if files.fileExists(atPath: file.path, isDirectory: &isFolder), isFolder.boolValue {
            throw DiffusionError(.input, "\(file.path): is a folder; expected the name of a PNG file")
        }
        var folder = file.deletingLastPathComponent()
        while !files.fileExists(atPath: folder.path), folder.path != "/" { folder.deleteLastPathComponent() }
        guard files.fileExists(atPath: folder.path, isDirectory: &isFolder), isFolder.boolValue else {
            throw DiffusionError(.input, "\(file.path): cannot be written: \(folder.path) is not a folder")
        }
        guard files.isWritableFile(atPath: folder.path) else {
            throw DiffusionError(.storage, "\(file.path): cannot be written: no permission in \(folder.path)")
        }
    }

    private static func files(_ arguments: Arguments, _ past: Past?) throws -> [String: URL] {
        var files: [String: URL] = [:]
        for name in Past.files {
            let option = "--" + name.replacingOccurrences(of: "_", with: "-")
            files[name] = try arguments.path(option) ?? past?.file(name, option: option)
        }
        return files
    }

    private static func requests(_ arguments: Arguments, _ past: Past?, _ files: [String: URL]) throws -> [Request] {
        var plain = try past?.request() ?? Request(prompt: "")
        let seed: UInt64 = try arguments.number("--seed", "a whole number, 0 to \(UInt64.max)") ?? plain.seeds[0]
        let count: UInt64 = try arguments.number("--count", "a whole number, at least 1") ?? 1
        guard count >= 1, seed <= UInt64.max - (count - 1) else {
            throw DiffusionError(.input, "seed \(seed) with --count \(count): expected 1 or more, to \(UInt64.max)")
        }
        if let negative = arguments.text("--negative-prompt") { plain.negativePrompts = [negative] }
        plain.numInferenceSteps = try arguments.number("--steps", "a whole number") ?? plain.numInferenceSteps
        plain.guidanceScale = try arguments.number("--guidance-scale", "a number") ?? plain.guidanceScale
        plain.scheduler = try arguments.text("--scheduler").map(SchedulerKind.init(named:)) ?? plain.scheduler
        plain.eta = try arguments.number("--eta", "a number") ?? plain.eta
        plain.strength = try arguments.number("--strength", "a number") ?? plain.strength
        plain.noiseLevel = try arguments.number("--noise-level", "a whole number") ?? plain.noiseLevel
        plain.refinerStart = try arguments.number("--refiner-start", "a number") ?? plain.refinerStart
        if arguments.flags.contains("--long-prompt") { plain.longPrompt = true }
        if let name = arguments.text("--rng") {
            guard let source = RandomSource(rawValue: name) else {
                throw DiffusionError(.input, "--rng \(name): expected torch, numpy or nvidia")
            }
            plain.randomSource = source
        }
        plain.image = try files["image"].map { try Picture(contentsOf: $0) }
        plain.mask = try files["mask"].map { try Picture(maskAt: $0) }
        plain.depth = try files["depth_image"].map { try DepthMap(contentsOf: $0) }
        return try prompts(arguments, past == nil ? nil : plain.prompts[0]).flatMap { prompt in
            (0..<count).map { number in
                var request = plain
                request.prompts = [prompt]
                request.seeds = [seed + number]
                return request
            }
        }
    }

    private static func prompts(_ arguments: Arguments, _ past: String?) throws -> [String] {
        switch (arguments.text("--prompt"), arguments.path("--prompts-file")) {
        case (let prompt?, nil): return [prompt]
        case (nil, let file?):
            guard let text = try? String(contentsOf: file, encoding: .utf8) else {
                throw DiffusionError(.input, "prompts file \(file.path): cannot be read as text")
            }
            let lines = text.split(whereSeparator: \.isNewline).map { $0.trimmingCharacters(in: .whitespaces) }
            let prompts = lines.filter { !$0.isEmpty }
            guard !prompts.isEmpty else {
                throw DiffusionError(.input, "prompts file \(file.path): holds no prompts (one per line)")
            }
            return prompts
        case (nil, nil):
            if let past { return [past] }
            throw DiffusionError(.input, "no prompt: give --prompt \"…\" or --prompts-file FILE")
        default: throw DiffusionError(.input, "--prompt and --prompts-file are both given: give one")
        }
    }
}
