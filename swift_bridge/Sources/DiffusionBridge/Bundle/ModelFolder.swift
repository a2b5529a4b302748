import Foundation

/// The models of one variant, found in a folder that `coreml-sd convert` wrote.
struct ModelFolder: Sendable {
    private static let attentions = ["original", "split_einsum_v2", "split_einsum"]
    let folder: URL
    let manifest: Manifest
    let tokenizer: URL
    /// What was chosen.
    let notes: [String]

    /// The best variant at a place, for compute units: models of the Neural Engine's attentions first, unless they are
    /// to run elsewhere, and compiled ones before packages.
    init(_ url: URL, units: ComputeUnits?, tokenizer named: URL?) throws {
        guard FileManager.default.fileExists(atPath: url.path) else {
            throw DiffusionError.input("\(url.path): no such folder; expected models that `coreml-sd convert` wrote")
        }
        if ["mlpackage", "mlmodelc"].contains(url.pathExtension) {
            throw DiffusionError.input(
                "\(url.path): is one model; name the folder that holds all of them, "
                    + url.deletingLastPathComponent().path)
        }
        if url.pathExtension == "zip" {
            throw DiffusionError.input("\(url.path): is a zip: unpack it and name the folder")
        }
        let found = Self.candidates(url, units).filter {
            FileManager.default.fileExists(atPath: $0.appending(Manifest.fileName).path)
        }
        guard let chosen = found.first else {
            throw DiffusionError.input(
                "\(url.path): holds no models that can be used: expected \(Manifest.fileName) there or in "
                    + "original/compiled and the like (for models without one, `coreml-sd bundle` writes it)")
        }
        folder = chosen
        manifest = try Manifest(contentsOf: chosen)
        let files = manifest.components.values.flatMap(\.files).sorted()
        let missing = files.filter { !FileManager.default.fileExists(atPath: chosen.appending($0).path) }
        guard missing.isEmpty else {
            throw DiffusionError.package(
                "\(chosen.path): \(Manifest.fileName) names what is not there: \(missing.joined(separator: ", "))")
        }
        guard let place = named ?? manifest.tokenizer.map({ chosen.appending($0) }) else {
            throw DiffusionError.input("\(chosen.path): no vocab.json and merges.txt beside the models: name their folder")
        }
        tokenizer = place
        let shown = { (folder: URL) in
            folder.path == url.path ? folder.lastPathComponent : String(folder.path.dropFirst(url.path.count + 1))
        }
        let others = found.dropFirst().map(shown).joined(separator: ", ")
        notes = others.isEmpty ? [] : ["using \(shown(chosen)) (also there: \(others))"]
    }

    /// Folders that may hold models, the best first.
    private static func candidates(_ url: URL, _ units: ComputeUnits?) -> [URL] {
        let isForNeuralEngine = units == nil || units == .all || units == .cpuAndNeuralEngine
        #if canImport(Darwin)
            let kinds = ["compiled", "packages"]
            let ordered = isForNeuralEngine ? Array(attentions.dropFirst()) + ["original"] : attentions
        #else
            // Without a Neural Engine the shorter program is the faster one, as for the Python runtime.
            let kinds = ["packages", "compiled"]
            let ordered = attentions
        #endif
        let inner = ordered.flatMap { attention in kinds.map { "\(attention)/\($0)" } + [attention] }
        return [url] + (kinds + ["Resources"] + inner).map { url.appending($0) }
    }

    /// What is loaded for a component.
    func load(_ component: Manifest.Component, _ units: ComputeUnits?) -> Models.Load {
        let urls = component.files.map { folder.appending($0) }
        let units = units ?? component.units
        return {
            var links: [any Model] = []
            for url in urls { links.append(try await CoreMLModel.load(url, units)) }
            return links.count == 1 ? links[0] : Chain(links)
        }
    }
}
