import Foundation

/// Folders that others made: Apple's converter, Hub repositories of compiled models. They have no manifest, so one is
/// made from the models' interfaces; what no interface tells is taken from the family, and said.
enum ForeignFolder {
    private static let compiled = [
        "text_encoder": "TextEncoder", "text_encoder_2": "TextEncoder2", "unet": "Unet", "refiner": "UnetRefiner",
        "vae_decoder": "VAEDecoder", "vae_encoder": "VAEEncoder", "safety_checker": "SafetyChecker",
        "depth_estimator": "DepthEstimator",
    ]
    private static let chunked = ["unet", "refiner"]
    private static let prefix = "Stable_Diffusion_version_"

    static func holdsUNet(_ folder: URL) -> Bool {
        ((try? components(folder)) ?? [:])["unet"] != nil
    }

    /// The components by name, chunks before the whole UNet as all apps prefer them. Throws for models of several
    /// checkpoints.
    static func components(_ folder: URL) throws -> [String: Manifest.Component] {
        let entries = ((try? FileManager.default.contentsOfDirectory(atPath: folder.path)) ?? []).sorted()
        var files: [String: [String]] = [:]
        for (component, name) in compiled {
            let halves = chunked.contains(component) ? [["\(name)Chunk1", "\(name)Chunk2"]] : []
            let able = (halves + [[name]]).map { $0.map { "\($0).mlmodelc" } }
            files[component] = able.first { $0.allSatisfy(entries.contains) }
        }
        if files["unet"] == nil { files = try packages(entries, folder) }
        let units: ComputeUnits = try isSplit(folder, files["unet"] ?? []) ? .cpuAndNeuralEngine : .cpuAndGPU
        return files.mapValues { files in
            Manifest.Component(
                files: files, inputs: [], units: units, sizeBytes: files.reduce(0) { $0 + size(folder.appending($1)) })
        }
    }

    private static func packages(_ entries: [String], _ folder: URL) throws -> [String: [String]] {
        var files: [String: [String]] = [:]
        var names: Set<String> = []
        for entry in entries where entry.hasPrefix(prefix) && entry.hasSuffix(".mlpackage") {
            let stem = entry.dropFirst(prefix.count).dropLast(".mlpackage".count)
            // The longest suffix counts: text_encoder_2 ends as text_encoder does not.
            let chunks = chunked.flatMap { ["\($0)_chunk1", "\($0)_chunk2"] }
            let known = (compiled.keys + chunks).filter { stem.hasSuffix("_\($0)") }.max { $0.count < $1.count }
            guard let known else { continue }
            names.insert(String(stem.dropLast(known.count + 1)))
            files[known] = [entry]
        }
        guard names.count < 2 else {
            throw DiffusionError.input(
                "\(folder.path): holds models of several checkpoints (\(names.sorted().joined(separator: ", "))): "
                    + "one folder for each")
        }
        for component in chunked {
            let halves = (1...2).compactMap { files.removeValue(forKey: "\(component)_chunk\($0)") }
            if halves.count == 2 { files[component] = halves[0] + halves[1] }
        }
        return files
    }

    /// Whether a program has einsum operations, which the attentions made for the Neural Engine have: an operation's
    /// name stands as it is in packages and in compiled models.
    private static func isSplit(_ folder: URL, _ files: [String]) throws -> Bool {
        try files.contains { file in
            let model = folder.appending(file)
            let places = ["model.mil", "Data/com.apple.CoreML/model.mlmodel"].map { model.appending($0) }
            guard let program = places.first(where: { FileManager.default.fileExists(atPath: $0.path) }) else { return false }
            return try Data(contentsOf: program, options: .mappedIfSafe).range(of: Data("einsum".utf8)) != nil
        }
    }

    private static func size(_ url: URL) -> Int {
        let found = FileManager.default.enumerator(at: url, includingPropertiesForKeys: [.fileSizeKey])
        let files = found?.allObjects as? [URL] ?? []
        return files.reduce(0) { $0 + ((try? $1.resourceValues(forKeys: [.fileSizeKey]))?.fileSize ?? 0) }
    }

    /// Beside the models; or where the Hub's folders keep it: with the compiled variant of the same models.
    static func tokenizer(_ folder: URL) -> URL? {
        let above = folder.deletingLastPathComponent()
        let inner = ["tokenizer", "Resources"].map { folder.appending($0) }
        let places = [folder] + inner + [above] + ["tokenizer", "compiled", "Resources"].map { above.appending($0) }
        return places.first { FileManager.default.fileExists(atPath: $0.appending("vocab.json").path) }
    }
}

extension ModelFolder {
    private static let schedule: [String: JSON] = [
        "beta_end": .number(0.012),
        "beta_schedule": .string("scaled_linear"), "beta_start": .number(0.00085), "clip_sample": .bool(false),
        "num_train_timesteps": .integer(1000), "set_alpha_to_one": .bool(false), "steps_offset": .integer(1),
    ]

    /// As the family's checkpoints are published.
    private static func scheduler(_ family: Family) -> [String: JSON] {
        let own: [String: JSON] =
            family.hasAddedConditions
            ? ["_class_name": .string("EulerDiscreteScheduler"), "timestep_spacing": .string("leading")]
            : ["_class_name": .string("PNDMScheduler"), "skip_prk_steps": .bool(true)]
        return schedule.merging(own) { $1 }
    }

    private func refiner() -> Manifest.Refiner? {
        guard components["refiner"] != nil else { return nil }
        return Manifest.Refiner(scheduler: Self.scheduler(Family.named("sdxl-refiner")), prediction: "epsilon")
    }

    /// The manifest of a folder that has none, from the interfaces of its models; and what was assumed.
    func described(_ models: Models, _ configuration: Pipeline.Configuration) async throws -> (Manifest, String) {
        let isEncoded = TextStates.encoders.contains { components[$0] != nil }
        let missing = (isEncoded ? [] : ["text_encoder"]) + (components["vae_decoder"] == nil ? ["vae_decoder"] : [])
        guard missing.isEmpty else {
            throw DiffusionError.input(
                "\(folder.path): no \(missing.joined(separator: " and no ")) beside the UNet: copy or convert it too")
        }
        let unet = try await models.model("unet")
        guard let sample = unet.inputs["sample"]?.shape, let text = unet.inputs["encoder_hidden_states"]?.shape,
            sample.count == 4, text.count == 4
        else {
            throw DiffusionError.package("\(folder.path): unet: expected inputs sample and encoder_hidden_states")
        }
        let family = Family.fitting(
            channels: sample[1], textWidth: text[1], latentSize: max(sample[2], sample[3]),
            hasAddedConditions: unet.inputs["time_ids"] != nil)
        if let told = configuration.predictionType, PredictionType(rawValue: told) == nil {
            throw DiffusionError.input("prediction type \(told): expected epsilon, v_prediction or sample")
        }
        let prediction = configuration.predictionType ?? family.predictionType
        let scale = configuration.latentScale ?? family.latentScale
        guard scale > 0, scale < 100 else {
            throw DiffusionError.input("latent scale \(scale): expected a positive number, mostly 0.18215")
        }
        let decoded = try await models.model("vae_decoder").model.outputs.values.first?.shape ?? []
        let isWhole = decoded.count == 4 && decoded[2] % sample[2] == 0 && decoded[2] > sample[2]
        let factor = isWhole ? decoded[2] / sample[2] : family.latentFactor
        let made = Manifest(
            name: folder.lastPathComponent, family: family.name,
            attention: components["unet"]?.units == .cpuAndNeuralEngine ? "split_einsum" : "original",
            latents: Manifest.Latents(channels: 4, factor: factor, scale: Float(scale), shift: 0), prediction: prediction,
            components: components, scheduler: Self.scheduler(family), noiseScheduler: family.noiseScheduler,
            zerosForEmptyPrompt: family.hasAddedConditions && family.textWidth == 2048, refiner: refiner(),
            wantsSafetyChecker: family.asksForSafetyChecker)
        let size = "\(sample[3] * factor)x\(sample[2] * factor)"
        let told = configuration.predictionType != nil && configuration.latentScale != nil
        return (
            made,
            "\(folder.lastPathComponent) has no manifest.json: taken for \(family.name), \(size), \(prediction) prediction, "
                + "latent scale \(scale), \(made.schedulerConfiguration.className.dropLast("Scheduler".count)) scheduler (\(told ? "as given" : "where not given, the family's usual values"))"
        )
    }
}
