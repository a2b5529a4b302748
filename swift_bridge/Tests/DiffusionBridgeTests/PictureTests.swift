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
