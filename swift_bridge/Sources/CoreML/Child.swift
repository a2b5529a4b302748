import Foundation
import Synchronization

/// What only the stand-in has: for tests of code that must work with Core ML's own buffers.
public enum StandIn {
    private static let alignment = Atomic<Int>(1)

    /// Rows of outputs begin at multiples of so many bytes, as in the Neural Engine's buffers. 1: without gaps.
    public static var rowAlignment: Int {
        get { alignment.load(ordering: .relaxed) }
        set { alignment.store(newValue, ordering: .relaxed) }
    }

    /// The child process's number, nil where none runs.
    public static var childProcess: Int32? { Child.current.withLock { $0?.processIdentifier } }
}

/// The process that runs all models: `coreml-sd run-models`, whose protocol its help describes. One request at a time.
final class Child: @unchecked Sendable {
    static let current = Mutex<Child?>(nil)
    private static let variable = "COREML_SD_COMMAND"
    private let process = Process()
    private let requests: FileHandle
    private let answers: FileHandle
    private let words: FileHandle
    private let lock = NSLock()

    var processIdentifier: Int32? { process.isRunning ? process.processIdentifier : nil }

    /// The child that runs, started where none does.
    static func running() throws -> Child {
        try current.withLock { child in
            if let child, child.process.isRunning { return child }
            let started = try Child()
            child = started
            return started
        }
    }

    private init() throws {
        // Writing to a child that has died must be an error, not the end of this program.
        signal(SIGPIPE, SIG_IGN)
        let (input, output) = (Pipe(), Pipe())
        let file = FileManager.default.temporaryDirectory.appendingPathComponent("run-models-\(UUID().uuidString).txt")
        guard FileManager.default.createFile(atPath: file.path, contents: nil) else {
            throw MLModelError(.io, "\(file.path): cannot be written")
        }
        // Without a name from here on, so that nothing is left behind however this program ends.
        defer { try? FileManager.default.removeItem(at: file) }
        words = try FileHandle(forReadingFrom: file)
        process.executableURL = try Self.command()
        process.arguments = ["run-models"]
        process.standardInput = input
        process.standardOutput = output
        process.standardError = try FileHandle(forWritingTo: file)
        requests = input.fileHandleForWriting
        answers = output.fileHandleForReading
        try process.run()
    }

    private static func command() throws -> URL {
        let environment = ProcessInfo.processInfo.environment
        if let named = environment[variable] { return URL(fileURLWithPath: named) }
        for folder in (environment["PATH"] ?? "").split(separator: ":") {
            let file = URL(fileURLWithPath: String(folder)).appendingPathComponent("coreml-sd")
            if FileManager.default.isExecutableFile(atPath: file.path) { return file }
        }
        throw MLModelError(
            .generic, "this system has no Core ML, and no `coreml-sd` on PATH to run models with: install it with "
                + "`pip install coreml-sd`, or name it in \(variable)")
    }

    /// Send a request and wait for its answer. Throws what the child says cannot be done, and where it has died.
    func ask(_ request: [String: Any], _ arrays: [Data] = []) throws -> (answer: [String: Any], arrays: [Data]) {
        lock.lock()
        defer { lock.unlock() }
        do {
            try requests.write(contentsOf: JSONSerialization.data(withJSONObject: request) + Data("\n".utf8))
            for array in arrays { try requests.write(contentsOf: array) }
        } catch {
            throw died()
        }
        let line = try readLine()
        guard let answer = try? JSONSerialization.jsonObject(with: line) as? [String: Any] else { throw died() }
        if let error = answer["error"] as? String { throw MLModelError(.generic, error) }
        let results = try (answer["arrays"] as? [[String: Any]] ?? []).map { entry in
            guard let shape = entry["shape"] as? [Int],
                let type = (entry["dtype"] as? String).flatMap(MLMultiArrayDataType.init(numpyName:))
            else { throw died() }
            return try read(shape.reduce(type.size, *))
        }
        return (answer, results)
    }

    private func readLine() throws -> Data {
        var line = Data()
        while line.last != UInt8(ascii: "\n") { line += try read(1) }
        return line
    }

    private func read(_ count: Int) throws -> Data {
        var data = Data()
        while data.count < count {
            guard let part = try? answers.read(upToCount: count - data.count), !part.isEmpty else { throw died() }
            data += part
        }
        return data
    }

    /// The error for a child that is gone, with the last line that it wrote.
    private func died() -> MLModelError {
        process.terminate()
        process.waitUntilExit()
        let text = String(decoding: (try? words.readToEnd()) ?? Data(), as: UTF8.self)
        let last = text.split(whereSeparator: \.isNewline).last.map { ": \($0)" } ?? ""
        return MLModelError(
            .generic, "the process that runs the models ended with code \(process.terminationStatus)\(last)")
    }
}
