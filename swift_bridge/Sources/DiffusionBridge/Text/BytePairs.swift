/// A vocabulary of byte pairs, and the merges that make its tokens (Sennrich et al., 2016).
struct BytePairs: Sendable {
    private struct Pair: Hashable {
        let left: Int
        let right: Int
    }

    private struct Merge {
        let rank: Int
        let token: Int
    }

    private let numbers: [String: Int]
    private let merges: [Pair: Merge]
    private let unknown: Int

    /// Throws where a merge makes or uses what is not in the vocabulary.
    init(numbers: [String: Int], merges lines: [Substring], unknown: Int) throws {
        self.numbers = numbers
        self.unknown = unknown
        var merges: [Pair: Merge] = [:]
        merges.reserveCapacity(lines.count)
        for (rank, line) in lines.enumerated() {
            let parts = line.split(separator: " ", omittingEmptySubsequences: false).map(String.init)
            guard parts.count == 2, let left = numbers[parts[0]], let right = numbers[parts[1]],
                let token = numbers[parts[0] + parts[1]]
            else {
                throw DiffusionError.package("merges.txt: '\(line)' is no pair of tokens of vocab.json")
            }
            merges[Pair(left: left, right: right)] = Merge(rank: rank, token: token)
        }
        self.merges = merges
    }

    /// The token numbers of one word.
    func encode(_ word: String) -> [Int] {
        let letters = word.utf8.map { ByteAlphabet.letters[Int($0)] }
        var symbols = Symbols(
            letters.indices.map { index in
                let isLast = index == letters.count - 1
                return numbers[String(letters[index]) + (isLast ? "</w>" : "")] ?? unknown
            })
        var queue = Heap()
        func offer(_ left: Int) {
            guard let right = symbols.after(left) else { return }
            let pair = Pair(left: symbols.tokens[left], right: symbols.tokens[right])
            if let merge = merges[pair] {
                queue.push(Candidate(rank: merge.rank, left: left, pair: (pair.left, pair.right), token: merge.token))
            }
        }
        for index in letters.indices { offer(index) }
        while let best = queue.pop() {
            guard symbols.merge(best) else { continue }
            offer(best.left)
            if let previous = symbols.before(best.left) { offer(previous) }
        }
        return symbols.remaining
    }
}

/// A merge that may be made at a place.
private struct Candidate {
    let rank: Int
    let left: Int
    let pair: (Int, Int)
    let token: Int

    func isBefore(_ other: Candidate) -> Bool {
        (rank, left) < (other.rank, other.left)
    }
}

/// The symbols of a word as a list whose members leave as they are merged.
private struct Symbols {
    private(set) var tokens: [Int]
    private var next: [Int]
    private var previous: [Int]
    private var isThere: [Bool]

    init(_ tokens: [Int]) {
        self.tokens = tokens
        next = Array(tokens.indices.map { $0 + 1 })
        previous = Array(tokens.indices.map { $0 - 1 })
        isThere = tokens.map { _ in true }
    }

    func after(_ index: Int) -> Int? { next[index] < tokens.count ? next[index] : nil }
    func before(_ index: Int) -> Int? { previous[index] >= 0 ? previous[index] : nil }
    var remaining: [Int] { tokens.indices.filter { isThere[$0] }.map { tokens[$0] } }

    /// Merge a pair; false where it is not there any more.
    mutating func merge(_ candidate: Candidate) -> Bool {
        guard isThere[candidate.left], tokens[candidate.left] == candidate.pair.0,
            let right = after(candidate.left), tokens[right] == candidate.pair.1
        else { return false }
        tokens[candidate.left] = candidate.token
        isThere[right] = false
        next[candidate.left] = next[right]
        if next[right] < tokens.count { previous[next[right]] = candidate.left }
        return true
    }
}

/// A binary heap: the candidate of lowest rank first, the leftmost of those.
private struct Heap {
    private var items: [Candidate] = []

    mutating func push(_ item: Candidate) {
        items.append(item)
        var child = items.count - 1
        while child > 0, items[child].isBefore(items[(child - 1) / 2]) {
            items.swapAt(child, (child - 1) / 2)
            child = (child - 1) / 2
        }
    }

    mutating func pop() -> Candidate? {
        guard let first = items.first, let last = items.popLast() else { return nil }
        guard !items.isEmpty else { return first }
        items[0] = last
        var parent = 0
        while true {
            let children = [2 * parent + 1, 2 * parent + 2].filter { $0 < items.count }
            guard let least = children.min(by: { items[$0].isBefore(items[$1]) }), items[least].isBefore(items[parent])
            else { return first }
            items.swapAt(parent, least)
            parent = least
        }
    }
}

/// The letter that stands for each byte in vocab.json: itself where it can be seen, else one from 256 on.
enum ByteAlphabet {
    static let letters: [Character] = {
        var hidden: UInt32 = 256
        return (0..<256).map { (byte: UInt32) in
            let isVisible = (0x21...0x7E).contains(byte) || (0xA1...0xAC).contains(byte) || byte >= 0xAE
            if !isVisible { hidden += 1 }
            return Character(Unicode.Scalar(isVisible ? byte : hidden - 1) ?? " ")
        }
    }()
    static let bytes = Dictionary(uniqueKeysWithValues: letters.enumerated().map { ($0.element, UInt8($0.offset)) })
}
