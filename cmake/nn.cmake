# What needs libtorch beside the operators: trainable layers.
if(NOT TARGET heed_torch)
  return()
endif()
file(GLOB HEED_NN_SOURCES CONFIGURE_DEPENDS heed/nn/*.cpp)
add_library(heed_nn STATIC ${HEED_NN_SOURCES})
target_link_libraries(heed_nn PUBLIC heed_torch heed_model PRIVATE nlohmann_json::nlohmann_json heed_options)
