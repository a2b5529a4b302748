import DiffusionBridge
import Foundation

/// `generate`: draw one picture after the other, write each as soon as it is done.
struct GenerateCommand {
    private static let previewEvery = 5
    private let order: Order

    init(_ words: [String]) throws {
        order = try Order(words)
    }

    func run() async throws {
        let preview = try order.preview()
        defer { if let preview { try? FileManager.default.removeItem(at: preview) } }
        let pipeline = try await Pipeline(contentsOf: order.models, configuration: order.configuration)
        for note in pipeline.notes { say("note: \(note)") }
        var done = 0
        do {
            if order.arguments.flags.contains("--prewarm") { try await pipeline.prewarm() }
            for (index, request) in order.requests.enumerated() {
                try await draw(request, index, pipeline, preview)
                done += 1
            }
        } catch where Task.isCancelled {
            say("interrupted: \(done) of \(order.requests.count) pictures are finished")
            throw CancellationError()
        }
        guard order.arguments.flags.contains("--timings") else { return }
        for (name, timing) in await pipeline.timings.sorted(by: { $0.key < $1.key }) {
            say(
                name + String(
                    format: " loaded in %.2f s, first call %.2f s, then %.3f s each (%d calls)",
                    timing.loadSeconds, timing.firstCallSeconds, timing.steadySeconds, timing.calls))
        }
    }

    private func draw(_ request: Request, _ index: Int, _ pipeline: Pipeline, _ preview: URL?) async throws {
        let isTerminal = isatty(STDERR_FILENO) == 1
        for try await step in pipeline.generate(request) {
            if isTerminal {
                let line = "\rpicture \(index + 1) of \(order.requests.count): step \(step.index + 1) of \(step.total)"
                FileHandle.standardError.write(Data(line.utf8))
            }
            if let preview, !step.isLast, step.index % Self.previewEvery == 0 {
                try await step.preview()[0].write(to: preview)
            }
            guard step.isLast else { continue }
            if isTerminal { say("") }
            try write(try await step.result(), request, index, pipeline)
        }
    }

    private func write(_ result: GenerationResult, _ request: Request, _ index: Int, _ pipeline: Pipeline) throws {
        for note in result.notes { say("note: \(note)") }
        let file = order.file(index)
        if result.flagged[0] {
            say(
                "note: \(file.path): the safety checker flagged this picture, so it is black; try another seed or prompt")
        }
        let record = try order.completed(pipeline.record(of: request), file).adding("flagged", result.flagged[0])
        try result.images[0].write(to: file, record: record)
        print("\(file.relativePath)  seed \(request.seeds[0])")
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
