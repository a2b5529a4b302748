import Foundation
import Testing

@testable import DiffusionBridge

@Test func familiesAreToldByTheInterface() {
    let name = { (channels: Int, width: Int, size: Int, isXL: Bool) in
        Family.fitting(channels: channels, textWidth: width, latentSize: size, hasAddedConditions: isXL).name
    }
    #expect(name(4, 768, 64, false) == "sd1" && name(9, 768, 64, false) == "sd1-inpainting")
    #expect(name(4, 1024, 64, false) == "sd2-base" && name(4, 1024, 96, false) == "sd2-v")
    #expect(name(5, 1024, 64, false) == "sd2-depth" && name(7, 1024, 128, false) == "x4-upscaler")
    #expect(name(4, 2048, 128, true) == "sdxl" && name(9, 2048, 128, true) == "sdxl-inpainting")
    #expect(name(4, 1280, 128, true) == "sdxl-refiner" && name(4, 5, 8, false) == "sd1")
    #expect(Family.named("sdxl-refiner").padding == "!" && Family.named("sdxl").padding == nil)
}

@Test func componentsAreFoundByApplesNames() throws {
    let folder = try TemporaryFolder()
    let make = { (name: String) in
        try FileManager.default.createDirectory(
            at: folder.url.appendingPathComponent(name), withIntermediateDirectories: true)
    }
    for name in ["unet", "text_encoder", "text_encoder_2", "vae_decoder", "unet_chunk1", "unet_chunk2"] {
        try make("Stable_Diffusion_version_a_model_\(name).mlpackage")
    }
    let packages = try ForeignFolder.components(folder.url)
    #expect(Set(packages.keys) == ["unet", "text_encoder", "text_encoder_2", "vae_decoder"])
    #expect(packages["unet"]?.files.count == 2 && packages["unet"]?.units == .cpuAndGPU)
    for name in ["Unet", "UnetChunk1", "UnetChunk2", "TextEncoder", "VAEDecoder"] { try make("\(name).mlmodelc") }
    try folder.write("UnetChunk1.mlmodelc/model.mil", "x = einsum(…)")
    let compiled = try ForeignFolder.components(folder.url)
    #expect(compiled["unet"]?.files == ["UnetChunk1.mlmodelc", "UnetChunk2.mlmodelc"])
    #expect(compiled["unet"]?.units == .cpuAndNeuralEngine && compiled["text_encoder"]?.files == ["TextEncoder.mlmodelc"])
    try make("Stable_Diffusion_version_other_unet.mlpackage")
    for name in ["Unet", "UnetChunk1"] {
        try FileManager.default.removeItem(at: folder.url.appendingPathComponent("\(name).mlmodelc"))
    }
    #expect(throws: DiffusionError.self) { try ForeignFolder.components(folder.url) }
}

@Test func modelsForOtherProgramsAreRefused() throws {
    let folder = try TemporaryFolder()
    try folder.write("manifest.json", #"{"format_version": 1, "layout": "comfyui"}"#)
    let error = #expect(throws: DiffusionError.self) { try Manifest(contentsOf: folder.url) }
    #expect(error?.message.contains("--layout comfyui") == true)
    try folder.write("manifest.json", #"{"format_version": 2}"#)
    let newer = #expect(throws: DiffusionError.self) { try Manifest(contentsOf: folder.url) }
    #expect(newer?.message.contains("newer") == true)
}
