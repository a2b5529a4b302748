import DiffusionBridge
import Foundation

/// A picture whose record is followed, and where the files are that the record names.
struct Past {
    static let files = ["image", "mask", "depth_image"]
    let picture: URL
    let record: Record

    init(_ picture: URL) throws {
        self.picture = picture
        record = try Record(contentsOf: picture)
    }

    func request() throws -> Request {
        do {
            return try record.request()
        } catch let error as DiffusionError {
            throw DiffusionError(error.kind, "picture \(picture.path): \(error.message)")
        }
    }

    /// The file that went into the picture, nil where there is none. Throws where it is gone or has changed.
    func file(_ name: String, option: String) throws -> URL? {
        guard let named = record.text(name) else { return nil }
        let there = try find(named, "name it with \(option)")
        guard let expected = record.text("\(name)_sha256") else { return there[0] }
        guard let found = there.first(where: { (try? sha256($0)) == expected }) else {
            throw DiffusionError(
                .input,
                "picture \(picture.path): its record names \(named), but \(there[0].path) has changed since: name the file "
                    + "that was used with \(option)")
        }
        return found
    }

    /// Where that lies what the record names: beside the picture, or in the current folder. Throws where it is not there.
    func find(_ name: String, _ remedy: String) throws -> [URL] {
        let beside = URL(fileURLWithPath: name, relativeTo: picture.deletingLastPathComponent().absoluteURL)
        let own = URL(fileURLWithPath: NSString(string: name).expandingTildeInPath)
        let found = [beside, own].filter { FileManager.default.fileExists(atPath: $0.path) }
        guard !found.isEmpty else {
            throw DiffusionError(
                .input,
                "picture \(picture.path): its record names \(name), which is neither beside the picture nor in the current "
                    + "folder: \(remedy)")
        }
        return found
    }

    /// How the record of a picture names a file or folder: from the picture's folder, else from the current one, else
    /// from the home folder, else in full.
    static func named(_ file: URL, by picture: URL) -> String {
        let target = file.standardizedFileURL.path
        let folders = [picture.deletingLastPathComponent().standardizedFileURL.path, FileManager.default.currentDirectoryPath]
        for folder in folders {
            if target == folder { return "." }
            let start = folder.hasSuffix("/") ? folder : folder + "/"
            if target.hasPrefix(start) { return String(target.dropFirst(start.count)) }
        }
        let home = NSHomeDirectory() + "/"
        return target.hasPrefix(home) ? "~/" + target.dropFirst(home.count) : target
    }
}

/// Of a file that can be read.
func sha256(_ file: URL) throws -> String { SHA256.hex(Array(try Data(contentsOf: file))) }
