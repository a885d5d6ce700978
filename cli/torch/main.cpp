// The commands that need libtorch; heed becomes this program for them (cli/become.h).

#include "cli/torch/commands.h"

int main(int argc, char** argv) {
  using namespace heed::cli;
  return run({.about = "heed: the commands that need libtorch.",
              .examples = "",
              .add =
                  [](CLI::App& app, Job& job) {
                    add_calibrate(app, job);
                    add_train(app, job);
                    add_lab(app, job);
                  }},
             argc, argv);
}
