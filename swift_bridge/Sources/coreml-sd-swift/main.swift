import DiffusionBridge
import Foundation

let help = """
    Draw pictures with converted models.

      coreml-sd-swift generate MODELS --prompt TEXT -o FILE.png
      coreml-sd-swift inspect MODELS

    Options of generate, as of the Python command:
      --prompt TEXT            what to draw
      --prompts-file FILE      one prompt per line, instead of --prompt
      -o, --output FILE.png    several pictures become NAME-1.png, NAME-2.png, …
      --negative-prompt TEXT   what not to draw
      --steps N                denoising steps (50)
      --guidance-scale N       how closely to follow the prompt; 1 or less: off (7.5)
      --seed N                 same seed, same picture (random, printed)
      --rng NAME               torch, numpy or nvidia (torch)
      --scheduler NAME         pndm, ddim, euler, … (the checkpoint's)
      --count N                pictures per prompt, with seeds counting up (1)
      --compute-units NAME     all, cpu-and-gpu, cpu-and-ne or cpu-only (the models')
      --tokenizer FOLDER       vocab.json and merges.txt, where the models have none
      --long-prompt            encode long prompts in pieces, where the UNet has room
      --reduce-memory          load and free models stage by stage
      --no-safety              do not use the safety checker
      --timings                say how long each model took
    """

/// A line for the user beside the pictures' names, which alone go to standard output.
func say(_ line: String) {
    FileHandle.standardError.write(Data((line + "\n").utf8))
}

let words = Array(CommandLine.arguments.dropFirst())
do {
    switch words.first {
    case "generate": try await GenerateCommand(Array(words.dropFirst())).run()
    case "inspect": try await inspect(Array(words.dropFirst()))
    case nil, "--help", "help": print(help)
    case let word?:
        throw DiffusionError(.input, "unknown command \(word): expected generate or inspect")
    }
} catch is CancellationError {
    say("interrupted")
    exit(130)
} catch {
    say("error: \(error)")
    exit(2)
}
