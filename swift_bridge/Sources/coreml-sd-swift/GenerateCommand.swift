import DiffusionBridge
import Foundation

/// `generate`: plan the pictures, draw one after the other, write each as soon as it is done.
struct GenerateCommand {
    private static let options: Set<String> = [
        "--prompt", "--prompts-file", "--output", "--negative-prompt", "--steps", "--guidance-scale", "--seed", "--rng",
        "--scheduler", "--count", "--compute-units", "--tokenizer",
    ]
    private static let flags: Set<String> = ["--long-prompt", "--reduce-memory", "--no-safety", "--timings"]
    private let arguments: Arguments
    private let models: URL
    private let output: URL
    private let requests: [Request]

    /// Throws for what is missing, contradictory or cannot be used, before any model is loaded.
    init(_ words: [String]) throws {
        arguments = try Arguments(words, options: Self.options, flags: Self.flags)
        guard let folder = arguments.positional.first, arguments.positional.count == 1 else {
            throw DiffusionError(.input, "expected one folder of models: generate MODELS --prompt … -o FILE.png")
        }
        models = URL(fileURLWithPath: folder)
        guard let output = arguments.path("--output") else {
            throw DiffusionError(.input, "no output named: give -o FILE.png")
        }
        guard output.pathExtension.lowercased() == "png" else {
            throw DiffusionError(.input, "\(output.path): expected a name that ends in .png")
        }
        self.output = output
        requests = try Self.requests(arguments)
    }

    private static func requests(_ arguments: Arguments) throws -> [Request] {
        let seed: UInt32 =
            try arguments.number("--seed", "a whole number, 0 to \(UInt32.max)") ?? .random(in: 0...UInt32.max)
        let count: UInt32 = try arguments.number("--count", "a whole number, at least 1") ?? 1
        guard count >= 1, seed <= UInt32.max - (count - 1) else {
            throw DiffusionError(.input, "seed \(seed) with --count \(count): expected 1 or more, to \(UInt32.max)")
        }
        var plain = Request(prompt: "", negativePrompt: arguments.text("--negative-prompt") ?? "", seed: seed)
        plain.numInferenceSteps = try arguments.number("--steps", "a whole number") ?? plain.numInferenceSteps
        plain.guidanceScale = try arguments.number("--guidance-scale", "a number") ?? plain.guidanceScale
        plain.scheduler = try arguments.text("--scheduler").map(SchedulerKind.init(named:))
        plain.longPrompt = arguments.flags.contains("--long-prompt")
        if let name = arguments.text("--rng") {
            guard let source = RandomSource(rawValue: name) else {
                throw DiffusionError(.input, "--rng \(name): expected torch, numpy or nvidia")
            }
            plain.randomSource = source
        }
        return try prompts(arguments).flatMap { prompt in
            (0..<count).map { number in
                var request = plain
                request.prompts = [prompt]
                request.seeds = [seed + number]
                return request
            }
        }
    }

    private static func prompts(_ arguments: Arguments) throws -> [String] {
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
        case (nil, nil): throw DiffusionError(.input, "no prompt: give --prompt \"…\" or --prompts-file FILE")
        default: throw DiffusionError(.input, "--prompt and --prompts-file are both given: give one")
        }
    }

    func run() async throws {
        var configuration = Pipeline.Configuration()
        configuration.computeUnits = try arguments.text("--compute-units").map(ComputeUnits.init(named:))
        configuration.reduceMemory = arguments.flags.contains("--reduce-memory")
        configuration.checkSafety = !arguments.flags.contains("--no-safety")
        configuration.tokenizer = arguments.path("--tokenizer")
        let pipeline = try await Pipeline(contentsOf: models, configuration: configuration)
        for note in pipeline.notes { say("note: \(note)") }
        for (index, request) in requests.enumerated() { try await draw(request, index, pipeline) }
        guard arguments.flags.contains("--timings") else { return }
        for (name, timing) in await pipeline.timings.sorted(by: { $0.key < $1.key }) {
            say(
                String(
                    format: "%@ loaded in %.2f s, first call %.2f s, then %.3f s each (%d calls)", name,
                    timing.loadSeconds, timing.firstCallSeconds, timing.steadySeconds, timing.calls))
        }
    }

    private func draw(_ request: Request, _ index: Int, _ pipeline: Pipeline) async throws {
        let isTerminal = isatty(STDERR_FILENO) == 1
        for try await step in pipeline.generate(request) {
            if isTerminal {
                let line = "\rpicture \(index + 1) of \(requests.count): step \(step.index + 1) of \(step.total)"
                FileHandle.standardError.write(Data(line.utf8))
            }
            guard step.isLast else { continue }
            if isTerminal { say("") }
            let result = try await step.result()
            for note in result.notes { say("note: \(note)") }
            let file = self.file(index)
            if result.flagged[0] {
                say(
                    "note: \(file.path): the safety checker flagged this picture, so it is black; try another seed or "
                        + "prompt")
            }
            try result.images[0].write(to: file, record: pipeline.record(of: request))
            print("\(file.relativePath)  seed \(request.seeds[0])")
        }
    }

    private func file(_ index: Int) -> URL {
        guard requests.count > 1 else { return output }
        let stem = output.deletingPathExtension().lastPathComponent
        return output.deletingLastPathComponent().appendingPathComponent("\(stem)-\(index + 1).png")
    }
}

/// `inspect`: what a folder of models is.
func inspect(_ words: [String]) async throws {
    let arguments = try Arguments(words, options: [], flags: [])
    guard let folder = arguments.positional.first, arguments.positional.count == 1 else {
        throw DiffusionError(.input, "expected one folder of models: inspect MODELS")
    }
    let pipeline = try await Pipeline(contentsOf: URL(fileURLWithPath: folder))
    for line in pipeline.notes + pipeline.description { print(line) }
}
