// The only file that imports CoreGraphics and ImageIO.
import Foundation

#if canImport(CoreGraphics) && canImport(ImageIO)
    import CoreGraphics
    import ImageIO

    extension Picture {
        /// The picture as CoreGraphics has it, in sRGB. Nil only where memory runs out.
        public var cgImage: CGImage? {
            guard let space = CGColorSpace(name: CGColorSpace.sRGB),
                let provider = CGDataProvider(data: Data(bytes) as CFData)
            else { return nil }
            return CGImage(
                width: width, height: height, bitsPerComponent: 8, bitsPerPixel: 24, bytesPerRow: 3 * width,
                space: space, bitmapInfo: CGBitmapInfo(rawValue: CGImageAlphaInfo.none.rawValue), provider: provider,
                decode: nil, shouldInterpolate: true, intent: .defaultIntent)
        }

        /// A picture of CoreGraphics, in sRGB, what is transparent on black. Throws where memory runs out.
        public init(_ image: CGImage) throws {
            let (width, height) = (image.width, image.height)
            guard let space = CGColorSpace(name: CGColorSpace.sRGB),
                let context = CGContext(
                    data: nil, width: width, height: height, bitsPerComponent: 8, bytesPerRow: 4 * width,
                    space: space, bitmapInfo: CGImageAlphaInfo.noneSkipLast.rawValue),
                let data = context.data
            else { throw DiffusionError.input("a picture of \(width)x\(height) pixels cannot be drawn") }
            context.draw(image, in: CGRect(x: 0, y: 0, width: width, height: height))
            let pixels = data.assumingMemoryBound(to: UInt8.self)
            var bytes = [UInt8](repeating: 0, count: 3 * width * height)
            for pixel in 0..<width * height {
                for channel in 0..<3 { bytes[3 * pixel + channel] = pixels[4 * pixel + channel] }
            }
            try self.init(width: width, height: height, bytes: bytes)
        }

        /// A picture of any kind that the system reads, turned upright.
        static func foreign(_ data: Data) throws -> Picture {
            guard let source = CGImageSourceCreateWithData(data as CFData, nil),
                let image = CGImageSourceCreateImageAtIndex(source, 0, nil)
            else { throw DiffusionError.input("not a picture that can be read") }
            let properties = CGImageSourceCopyPropertiesAtIndex(source, 0, nil) as? [CFString: Any]
            let orientation = properties?[kCGImagePropertyOrientation] as? Int ?? 1
            let picture = try Picture(image)
            let turned = Orientation.upright(
                picture.bytes, picture.width, picture.height, channels: 3, orientation)
            return try Picture(width: turned.width, height: turned.height, bytes: turned.values)
        }
    }
#else
    extension Picture {
        static func foreign(_ data: Data) throws -> Picture {
            throw DiffusionError.input("not a PNG file, the only kind that is read on this system")
        }
    }
#endif
