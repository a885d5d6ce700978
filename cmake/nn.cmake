# What needs libtorch beside the operators: trainable layers, and the commands of heed-torch, which heed becomes for
# them. Without torch heed says so when one of these commands is asked for.
if(NOT TARGET heed_torch)
  return()
endif()
file(GLOB HEED_NN_SOURCES CONFIGURE_DEPENDS heed/nn/*.cpp)
add_library(heed_nn STATIC EXCLUDE_FROM_ALL ${HEED_NN_SOURCES})
target_link_libraries(heed_nn PUBLIC heed_torch heed_model PRIVATE nlohmann_json::nlohmann_json heed_options)
# What is hot here is torch's and heed's; torch's headers take long to optimise.
target_compile_options(heed_nn PUBLIC $<$<CONFIG:Release>:-O1>)

if(HEED_COMMAND)
  file(GLOB HEED_TORCH_CLI_SOURCES CONFIGURE_DEPENDS cli/torch/*.cpp lab/*.cpp)
  add_executable(heed_torch_command ${HEED_TORCH_CLI_SOURCES})
  set_target_properties(heed_torch_command PROPERTIES OUTPUT_NAME heed-torch INSTALL_RPATH_USE_LINK_PATH ON)
  target_link_libraries(heed_torch_command PRIVATE heed_cli heed_nn heed_options)
  add_executable(example_train examples/train.cpp)
  target_link_libraries(example_train PRIVATE heed_nn heed_options)
endif()
