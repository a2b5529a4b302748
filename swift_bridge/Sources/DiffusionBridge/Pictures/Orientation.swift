/// How a camera was held: pictures are stored as its sensor saw them.
enum Orientation {
    /// The orientation, 1 to 8, that EXIF data name, nil where they name none.
    static func read(_ exif: [UInt8]) -> Int? {
        let isLittle = exif.starts(with: [0x49, 0x49, 42, 0])
        guard isLittle || exif.starts(with: [0x4D, 0x4D, 0, 42]) else { return nil }
        func number(_ place: Int, _ count: Int) -> Int? {
            guard place >= 0, place + count <= exif.count else { return nil }
            let bytes = exif[place..<place + count]
            return (isLittle ? Array(bytes.reversed()) : Array(bytes)).reduce(0) { $0 << 8 | Int($1) }
        }
        guard let directory = number(4, 4), let entries = number(directory, 2) else { return nil }
        for entry in 0..<entries {
            let place = directory + 2 + 12 * entry
            guard number(place, 2) == 0x0112 else { continue }
            return number(place + 8, 2).flatMap { (1...8).contains($0) ? $0 : nil }
        }
        return nil
    }

    /// Values turned upright: as many for each pixel as `channels` says.
    static func upright<Value>(
        _ values: [Value], _ width: Int, _ height: Int, channels: Int, _ orientation: Int
    ) -> (values: [Value], width: Int, height: Int) {
        guard orientation > 1 else { return (values, width, height) }
        let isTurned = orientation > 4
        let (newWidth, newHeight) = isTurned ? (height, width) : (width, height)
        var made: [Value] = []
        made.reserveCapacity(values.count)
        for row in 0..<newHeight {
            for column in 0..<newWidth {
                let (x, y) = isTurned ? (row, column) : (column, row)
                let (flipsX, flipsY) = ([2, 3, 7, 8].contains(orientation), [3, 4, 6, 7].contains(orientation))
                let place = (flipsY ? height - 1 - y : y) * width + (flipsX ? width - 1 - x : x)
                made += values[place * channels..<(place + 1) * channels]
            }
        }
        return (made, newWidth, newHeight)
    }
}
