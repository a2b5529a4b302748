import Foundation
import Testing

@testable import DiffusionBridge

private func noisy(_ count: Int) -> [UInt8] {
    var twister = MersenneTwister(seed: 5)
    return (0..<count).map { $0 % 7 < 3 ? UInt8($0 % 5) : UInt8(truncatingIfNeeded: twister.next()) }
}

@Test(arguments: [0, 1, 2, 3, 1000, 100_000]) func whatWasCompressedComesBack(count: Int) throws {
    for bytes in [noisy(count), [UInt8](repeating: 9, count: count)] {
        #expect(try Inflate.bytes(of: Deflate.compressed(bytes), limit: count) == bytes)
    }
}

@Test func damagedCompressedDataAreRefused() throws {
    let whole = Deflate.compressed(noisy(1000))
    #expect(throws: DiffusionError.self) { try Inflate.bytes(of: whole, limit: 999) }
    for place in 0..<whole.count {
        var damaged = whole
        damaged[place] ^= 0x10
        #expect(throws: DiffusionError.self) { try Inflate.bytes(of: damaged, limit: 1000) }
        #expect(throws: DiffusionError.self) { try Inflate.bytes(of: Array(whole.prefix(place)), limit: 1000) }
    }
}

@Test func halvesAreRoundedToTheNearest() {
    for bits in UInt16.min...UInt16.max {
        let value = Half.float(bits)
        #expect(value.isNaN ? Half.float(Half.bits(value)).isNaN : Half.bits(value) == bits)
    }
    #if !(os(macOS) && arch(x86_64))
        var twister = MersenneTwister(seed: 1)
        for _ in 0..<200_000 {
            let value = Float(bitPattern: twister.next())
            #expect(value.isNaN || Half.bits(value) == Float16(value).bitPattern)
        }
    #endif
}

@Test func textsStandBesideThePixels() throws {
    let picture = try Picture(width: 5, height: 4, bytes: noisy(60))
    let file = PNG.encoded(picture, texts: [("coreml-sd", "{\"prompt\": \"日本 \\n\"}"), ("Software", "x")])
    #expect(try PNG.texts(file) == ["coreml-sd": "{\"prompt\": \"日本 \\n\"}", "Software": "x"])
    #expect(throws: DiffusionError.self) { try PNG.texts(Array(file.dropLast(20))) }
    #expect(throws: DiffusionError.self) { try Picture(width: 5, height: 4, bytes: []) }
}

private struct PictureGolden: Decodable {
    struct File: Decodable {
        let name: String
        let file: Data
        let width: Int
        let height: Int
        let picture: Data
        let mask: Data
        let depths: Data
    }

    struct Resized: Decodable {
        let picture: Data
        let width: Int
        let height: Int
        let lanczos: Data
        let bicubic: Data
    }

    struct Depths: Decodable {
        let depths: Data
        let width: Int
        let height: Int
        let small: Data
    }

    static let side = (width: 13, height: 9)
    let files: [File]
    let resized: [Resized]
    let depths: [Depths]
}

@Test func everyKindOfPNGIsReadAsPillowReadsIt() throws {
    let expected: PictureGolden = try golden("pictures")
    #expect(expected.files.count >= 38)
    let folder = try TemporaryFolder()
    let file = folder.url.appendingPathComponent("picture.png")
    for item in expected.files {
        try item.file.write(to: file)
        let (picture, mask) = (try Picture(contentsOf: file), try Picture(maskAt: file))
        let depths = try DepthMap(contentsOf: file)
        #expect(picture.width == item.width && picture.height == item.height, "\(item.name)")
        let greys: [UInt8] = item.mask.flatMap { [UInt8](repeating: $0, count: 3) }
        let isEqual = (picture.bytes == Array(item.picture), mask.bytes == greys, depths.values == floats(item.depths))
        #expect(isEqual == (true, true, true), "\(item.name)")
    }
}

@Test func picturesInOtherSizesAreThoseOfPillowToTheBit() throws {
    let expected: PictureGolden = try golden("pictures")
    for item in expected.resized {
        let (width, height) = PictureGolden.side
        let picture = try Picture(width: width, height: height, bytes: Array(item.picture))
        #expect(picture.resized(item.width, item.height, .lanczos).bytes == Array(item.lanczos))
        #expect(picture.resized(item.width, item.height, .bicubic).bytes == Array(item.bicubic))
    }
}

@Test func depthsInOtherSizesAreThoseOfTorch() throws {
    let expected: PictureGolden = try golden("pictures")
    for item in expected.depths {
        let (width, height) = PictureGolden.side
        let map = try DepthMap(width: width, height: height, values: floats(item.depths))
        let found = map.resized(item.width, item.height)
        #expect(zip(found, floats(item.small)).allSatisfy { abs($0 - $1) < 1e-5 } && found.count == item.width * item.height)
    }
}

@Test func damagedPicturesAreRefusedByName() throws {
    let expected: PictureGolden = try golden("pictures")
    let whole = Array(try #require(expected.files.first { $0.name == "type 3, 8 bits" }).file)
    let folder = try TemporaryFolder()
    let file = folder.url.appendingPathComponent("picture.png")
    for place in stride(from: 0, to: whole.count, by: 7) {
        var damaged = whole
        damaged[place] ^= 0x21
        for bytes in [damaged, Array(whole.prefix(place))] {
            try Data(bytes).write(to: file)
            let error = #expect(throws: DiffusionError.self) { try Picture(contentsOf: file) }
            #expect(error?.message.contains("picture.png") == true)
        }
    }
    let nowhere = folder.url.appendingPathComponent("nowhere.png")
    #expect(throws: DiffusionError.self) { try Picture(contentsOf: nowhere) }
}

@Test func aRecordIsReadAsItWasWritten() throws {
    let folder = try TemporaryFolder()
    let file = folder.url.appendingPathComponent("picture.png")
    let picture = try Picture(width: 1, height: 1, bytes: [1, 2, 3])
    #expect(throws: DiffusionError.self) {
        try picture.write(to: file)
        return try Record(contentsOf: file)
    }
    let made = Record([
        ("prompt", .string("日本 \"x\"")), ("negative_prompt", .null), ("seed", .unsigned(UInt64.max)), ("steps", .integer(7)),
        ("guidance_scale", .number(5)), ("eta", .number(0.5)), ("scheduler", .string("dpm++ 2m karras")),
        ("refiner_start", .number(0.8)),
    ])
    try picture.write(to: file, record: made.adding("models", "a/b").adding("long_prompt", true))
    let read = try Record(contentsOf: file)
    let request = try read.request()
    #expect(request.prompts == ["日本 \"x\""] && request.negativePrompts.isEmpty && request.seeds == [UInt64.max])
    #expect(request.numInferenceSteps == 7 && request.longPrompt && request.guidanceScale == 5 && request.scheduler == .dpmPlusPlus2MKarras)
    #expect(request.eta == 0.5 && request.refinerStart == 0.8)
    #expect(read.text("models") == "a/b" && read.number("latent_scale") == nil)
    let unusable: [(String, JSON)] = [
        ("steps", .string("many")), ("refiner_start", .string("late")), ("controls", .array([.object(["name": .string("canny")])])),
    ]
    for damage in unusable {
        try picture.write(to: file, record: Record([("prompt", .string("x")), damage]))
        #expect(throws: DiffusionError.self) { try Record(contentsOf: file).request() }
    }
}
