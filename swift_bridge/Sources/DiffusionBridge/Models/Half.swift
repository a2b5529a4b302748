/// Float16 by its bits: Swift has no Float16 on Intel Macs. Without branches, so that loops become vector instructions.
enum Half {
    /// Rounded to the nearest, to even where two are as near.
    @inline(__always)
    static func bits(_ value: Float) -> UInt16 {
        let all = value.bitPattern
        let magnitude = Int32(bitPattern: all & 0x7FFF_FFFF)
        let normal = (magnitude &- 0x3800_0000 &+ 0xFFF &+ ((magnitude >> 13) & 1)) >> 13
        // Adding one half moves the bits of a subnormal result to the end of the fraction, rounded.
        let small = Int32(bitPattern: (Float(bitPattern: UInt32(bitPattern: magnitude)) + 0.5).bitPattern) &- 0x3F00_0000
        let finite = magnitude < 0x3880_0000 ? small : normal
        let numeric = magnitude >= 0x4780_0000 ? 0x7C00 : finite
        let half = magnitude > 0x7F80_0000 ? 0x7E00 : numeric
        return UInt16(truncatingIfNeeded: UInt32(bitPattern: half) | (all >> 16 & 0x8000))
    }

    @inline(__always)
    static func float(_ bits: UInt16) -> Float {
        let magnitude = UInt32(bits & 0x7FFF) << 13
        let finite = (Float(bitPattern: magnitude) * 0x1p112).bitPattern
        let value = magnitude >= 0x0F80_0000 ? magnitude | 0x7F80_0000 : finite
        return Float(bitPattern: value | UInt32(bits & 0x8000) << 16)
    }
}
