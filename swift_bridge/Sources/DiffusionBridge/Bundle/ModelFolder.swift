import Foundation

/// The models of one variant, found in a folder that `coreml-sd convert` or Apple's tools wrote.
struct ModelFolder: Sendable {
    private static let attentions = ["original", "split_einsum_v2", "split_einsum"]
    let folder: URL
    /// Nil for folders that others made: see ``described(_:_:)``.
    let manifest: Manifest?
    let components: [String: Manifest.Component]
    private let tokenizer: URL
    /// What was chosen.
    let notes: [String]

    /// The best variant at a place, for compute units: models of the Neural Engine's attentions first, unless they are
    /// to run elsewhere, and compiled ones before packages. Folders with a manifest come before others.
    init(_ url: URL, _ configuration: Pipeline.Configuration) throws {
        try Self.check(url)
        let isDescribed = { (folder: URL) in Self.isThere(folder.appending(Manifest.fileName)) }
        let all = Self.candidates(url, configuration.computeUnits)
        let described = all.filter(isDescribed)
        let found = described + all.filter { !isDescribed($0) && ForeignFolder.holdsUNet($0) }
        guard let chosen = found.first else {
            throw DiffusionError.input(
                "\(url.path): holds no models: expected \(Manifest.fileName), Stable_Diffusion_version_*_unet.mlpackage or "
                    + "Unet.mlmodelc, there or in original/packages and the like")
        }
        folder = chosen
        manifest = described.isEmpty ? nil : try Manifest(contentsOf: chosen)
        components = try manifest?.components ?? ForeignFolder.components(chosen)
        let files = components.values.flatMap(\.files).sorted()
        let missing = files.filter { !Self.isThere(chosen.appending($0)) }
        guard missing.isEmpty else {
            throw DiffusionError.package(
                "\(chosen.path): \(Manifest.fileName) names what is not there: \(missing.joined(separator: ", "))")
        }
        let own = manifest.map { $0.tokenizer.map { chosen.appending($0) } } ?? ForeignFolder.tokenizer(chosen)
        guard let place = configuration.tokenizer ?? own else {
            throw DiffusionError.input("\(chosen.path): no vocab.json and merges.txt beside the models: name their folder")
        }
        tokenizer = place
        let shown = { (folder: URL) in
            folder.path == url.path ? folder.lastPathComponent : String(folder.path.dropFirst(url.path.count + 1))
        }
        let others = found.dropFirst().map(shown).joined(separator: ", ")
        notes = others.isEmpty ? [] : ["using \(shown(chosen)) (also there: \(others))"]
        if let manifest { try Self.check(configuration, manifest) }
    }

    private static func isThere(_ url: URL) -> Bool { FileManager.default.fileExists(atPath: url.path) }

    private static func check(_ url: URL) throws {
        guard isThere(url) else {
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
    }

    /// Throw where the caller contradicts a manifest, which knows better.
    private static func check(_ configuration: Pipeline.Configuration, _ manifest: Manifest) throws {
        if let told = configuration.predictionType, told != manifest.prediction {
            throw DiffusionError.input(
                "prediction type \(told): the manifest of these models says \(manifest.prediction); leave it out")
        }
        if let told = configuration.latentScale, Float(told) != manifest.latents.scale {
            throw DiffusionError.input(
                "latent scale \(told): the manifest of these models says \(manifest.latents.scale); leave it out")
        }
    }

    /// The tokenizers of the text encoders that there are, in order.
    func tokenizers(_ manifest: Manifest) throws -> [Tokenizer] {
        let lengths = TextStates.encoders.compactMap { components[$0] }.map {
            $0.inputs.first?.shape.last ?? Tokenizer.usualLength
        }
        let first = try Tokenizer(
            contentsOf: tokenizer, length: lengths.first ?? Tokenizer.usualLength,
            padding: Family.named(manifest.family).padding)
        guard lengths.count > 1 else { return [first] }
        let second = manifest.secondTokenizer.map { folder.appending($0) } ?? tokenizer
        return [first, try Tokenizer(contentsOf: second, length: lengths[1], padding: "!")]
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
        let named = [url] + (kinds + ["Resources"] + inner).map { url.appending($0) }
        return named + onlyFolder(url)
    }

    /// The only folder in one, as of an unpacked zip.
    private static func onlyFolder(_ url: URL) -> [URL] {
        let keys: [URLResourceKey] = [.isDirectoryKey]
        let entries = (try? FileManager.default.contentsOfDirectory(at: url, includingPropertiesForKeys: keys)) ?? []
        let folders = entries.filter { entry in
            let isFolder = (try? entry.resourceValues(forKeys: Set(keys)).isDirectory) ?? false
            return isFolder && !entry.lastPathComponent.hasPrefix(".") && !entry.lastPathComponent.hasPrefix("__")
        }
        guard let only = folders.first, folders.count == 1,
            !["mlpackage", "mlmodelc"].contains(only.pathExtension),
            !(attentions + ["packages", "compiled", "Resources"]).contains(only.lastPathComponent)
        else { return [] }
        return [only]
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
