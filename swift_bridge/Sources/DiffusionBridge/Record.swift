import Foundation

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

    /// How a picture was made, as the Python command records it: `coreml-sd generate --from` repeats the picture.
    public func record(of request: Request) -> Record {
        let used = request.scheduler?.applied(to: manifest.schedulerConfiguration) ?? manifest.schedulerConfiguration
        let scheduler = SchedulerKind.named(used)?.rawValue ?? used.className
        return Record(members: [
            ("prompt", .string(request.prompts.first ?? "")),
            ("negative_prompt", .string(request.negativePrompts.first ?? "")),
            ("seed", .integer(Int(request.seeds.first ?? 0))),
            ("rng", .string(request.randomSource.rawValue)),
            ("scheduler", .string(scheduler)),
            ("steps", .integer(request.numInferenceSteps)),
            ("guidance_scale", .number(request.guidanceScale)),
            ("long_prompt", .bool(request.longPrompt)),
            ("task", .string("text to image")),
            ("model", .string(manifest.name)),
            ("revision", manifest.revision.map(JSON.string) ?? .null),
            ("family", .string(manifest.family)),
            ("attention", .string(manifest.attention)),
            ("safety_checker", .bool(checksSafety)),
        ])
    }
}

/// How a picture was made, for the PNG's text.
public struct Record: Sendable {
    fileprivate let members: [(String, JSON)]
}

extension Picture {
    /// The bytes of a PNG file, with a record of the picture's making beside the pixels.
    public func png(record: Record? = nil) -> Data {
        let texts = record.map { [("coreml-sd", JSON.text(of: $0.members)), ("Software", "coreml-sd")] } ?? []
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
