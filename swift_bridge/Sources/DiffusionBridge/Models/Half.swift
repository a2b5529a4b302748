/// Float16 by its bits: Swift has no Float16 on Intel Macs.
enum Half {
    /// Rounded to the nearest, to even where two are as near.
    static func bits(_ value: Float) -> UInt16 {
        let all = value.bitPattern
        let sign = UInt16(truncatingIfNeeded: (all >> 16) & 0x8000)
        let magnitude = all & 0x7FFF_FFFF
        if magnitude > 0x7F80_0000 { return sign | 0x7E00 }
        if magnitude >= 0x4780_0000 { return sign | 0x7C00 }
        if magnitude < 0x3880_0000 {
            // Adding one half moves the bits of a subnormal result to the end of the fraction, rounded.
            let shifted = Float(bitPattern: magnitude) + 0.5
            return sign | UInt16(truncatingIfNeeded: shifted.bitPattern &- Float(0.5).bitPattern)
        }
        let rounded = magnitude &- 0x3800_0000 &+ 0xFFF &+ ((magnitude >> 13) & 1)
        return sign | UInt16(truncatingIfNeeded: rounded >> 13)
    }

    static func float(_ bits: UInt16) -> Float {
        let magnitude = UInt32(bits & 0x7FFF) << 13
        let isSpecial = bits & 0x7C00 == 0x7C00
        let value = isSpecial ? magnitude | 0x7F80_0000 : (Float(bitPattern: magnitude) * 0x1p112).bitPattern
        return Float(bitPattern: value | UInt32(bits & 0x8000) << 16)
    }
}
