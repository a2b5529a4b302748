import Foundation
import Testing

@testable import DiffusionBridge

/// A UNet of 512x512 pictures that answers at once: its inputs are converted as Core ML's are, its answer lies there.
private struct InstantUNet: Model {
    private let sample = Memory(count: 2 * 4 * 64 * 64)
    private let answer = Memory(count: 2 * 4 * 64 * 64)
    let inputs = Dictionary(
        uniqueKeysWithValues: [("sample", [2, 4, 64, 64]), ("timestep", [2]), ("encoder_hidden_states", [2, 768, 1, 77])]
            .map { ($0, TensorSpec(name: $0, shape: $1)) })
    let outputs = ["noise_pred": TensorSpec(name: "noise_pred", shape: [2, 4, 64, 64])]

    func predict(_ tensors: [String: Tensor]) async throws -> [String: Tensor] {
        let shape = [2, 4, 64, 64]
        let given = Layout(shape: shape, strides: [16384, 4096, 64, 1], element: .float16)
        if let values = tensors["sample"]?.values { given.write(values, to: sample.bytes) }
        return ["noise_pred": Tensor(shape: shape, values: given.read(UnsafeRawBufferPointer(answer.bytes)))]
    }
}

private final class Memory: @unchecked Sendable {
    let bytes: UnsafeMutableRawBufferPointer

    init(count: Int) {
        bytes = .allocate(byteCount: 2 * count, alignment: 64)
        for index in 0..<count { bytes.storeBytes(of: UInt16(index % 0x3C00), toByteOffset: 2 * index, as: UInt16.self) }
    }

    deinit { bytes.deallocate() }
}

private let isAsked = ProcessInfo.processInfo.environment["BRIDGE_BENCH"] != nil

/// `make bench` runs it in a release build: milliseconds for a step of everything that is not a model call.
@Test(.enabled(if: isAsked, "only `make bench` measures")) func loopBench() async throws {
    let checkpoint = SchedulerConfiguration([
        "_class_name": .string("PNDMScheduler"), "beta_end": .number(0.012), "beta_schedule": .string("scaled_linear"),
        "beta_start": .number(0.00085), "num_train_timesteps": .integer(1000), "set_alpha_to_one": .bool(false),
        "skip_prk_steps": .bool(true), "steps_offset": .integer(1),
    ])
    let models = Models(["unet": { InstantUNet() }], keeps: true)
    let states = Tensor(repeating: 0, shape: [2, 768, 1, 77])
    let guidance = try Guidance(
        try await models.model("unet"), pictures: 1, Guidance.Conditions(rows: ["encoder_hidden_states": states]),
        scale: 7.5)
    let clock = ContinuousClock()
    for kind in [SchedulerKind.ddim, .pndm, .euler, .dpmPlusPlus2MKarras, .unipc] {
        var best = Double.infinity
        for _ in 0..<25 {
            var scheduler = try kind.applied(to: checkpoint).scheduler(steps: 50)
            var latents = Tensor(repeating: 0.5, shape: [1, 4, 64, 64])
            let start = clock.now
            for timestep in scheduler.timesteps {
                let output = try await guidance.predict(scheduler.scaled(latents), timestep)
                latents = try scheduler.step(output, latents) { $0 }
            }
            best = min(best, (clock.now - start).seconds * 1000 / Double(scheduler.timesteps.count))
        }
        print("loop: \(kind.rawValue) \(best)")
    }
}
